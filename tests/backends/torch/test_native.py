"""PyTorch's own modules and optimizers in steps give the numbers of a loop in PyTorch, and keep nothing of a trace."""

import functools

import keras
import pytest
import torch
from keras import layers
from torch._subclasses import FakeTensor

import handloom as hl
from handloom.errors import FallbackWarning
from tests.numbers import close, numpy, ones, same

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
STEPS = 5


def module_of_torch():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def model_of_keras():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((8,)), layers.Dense(16, "tanh"), layers.Dense(1)])


def by_gradients(parameters):
    """Plain descent, without an optimizer."""

    def update(loss):
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.05 * gradient)

    return update


def by(optimizer, zero_first=True):
    def updating(parameters):
        made = optimizer(parameters)

        def update(loss):
            if zero_first:
                made.zero_grad()
            loss.backward()
            made.step()
            if not zero_first:
                made.zero_grad()

        return update

    return updating


SGD = functools.partial(torch.optim.SGD, lr=0.05)
UPDATES = {
    "SGD": by(SGD),
    "momentum": by(functools.partial(SGD, momentum=0.9)),
    "Adam": by(functools.partial(torch.optim.Adam, lr=0.05)),
    "Adam, gradients cleared last": by(functools.partial(torch.optim.Adam, lr=0.05), zero_first=False),
}


def training(make, updating):
    """A model of torch's kind, and a step that trains it."""
    model = make()
    update = updating(list(model.parameters()))

    def step(x, y):
        loss = ((model(x) - y) ** 2).mean()
        update(loss)
        return loss.detach()

    return model, step


def losses(step):
    return [float(step(X, Y)) for _ in range(STEPS)]


def is_of_a_trace(tensor):
    return isinstance(tensor, FakeTensor) or isinstance(tensor.grad, FakeTensor)


@pytest.mark.parametrize("make", [module_of_torch, model_of_keras])
@pytest.mark.parametrize("updating", UPDATES.values(), ids=UPDATES)
def test_function_trains_by_an_optimizer_of_torch_with_the_numbers_of_torch(make, updating):
    expected = losses(training(make, updating)[1])
    model, step = training(make, updating)
    with pytest.warns(FallbackWarning, match="backward.. reaches tensors|torch.optim.* has a state"):
        found = losses(hl.function(step))
    close(found, expected)
    assert found[-1] < found[0] / 2
    assert not any(map(is_of_a_trace, model.parameters()))


def test_function_trains_a_module_of_torch_by_gradients_with_the_numbers_of_torch():
    expected = losses(training(module_of_torch, by_gradients)[1])
    with pytest.warns(FallbackWarning, match="changes a tensor of torch that is not the value of a Keras variable"):
        close(losses(hl.function(training(module_of_torch, by_gradients)[1])), expected)


def test_fit_trains_a_module_of_torch_with_the_numbers_of_torch():
    _, step = training(module_of_torch, UPDATES["Adam"])
    expected = [float(step(X, Y)) for _ in range(STEPS)]
    _, step = training(module_of_torch, UPDATES["Adam"])
    with pytest.warns(FallbackWarning, match=r"torch\.optim|backward"):
        history = hl.fit(lambda x, y: {"loss": step(x, y)}, hl.Feed((X, Y), batch_size=64), epochs=STEPS, verbose=0)
    close(history.history["loss"], expected)


def test_model_trains_by_an_optimizer_of_torch_in_its_own_step():
    class Native(hl.Model):
        def train_step(self, data):
            x, y = data
            self.optimizer_of_torch.zero_grad()
            loss = ((self(x) - y) ** 2).mean()
            loss.backward()
            self.optimizer_of_torch.step()
            return {"loss": loss.detach()}

    inputs = keras.Input((8,))
    model = Native(inputs, model_of_keras()(inputs))
    model.compile()
    model.optimizer_of_torch = torch.optim.Adam(model.parameters(), lr=0.05)
    _, step = training(model_of_keras, UPDATES["Adam"])
    expected = losses(step)
    with pytest.warns(FallbackWarning, match=r"torch\.optim\.Adam has a state of its own"):
        history = model.fit(X, Y, batch_size=64, epochs=STEPS, shuffle=False, verbose=0)
    close(history.history["loss"], expected, rtol=1e-4)


def test_function_counts_the_batches_of_a_batch_normalization_of_torch_once():
    norm = torch.nn.BatchNorm1d(8)
    step = hl.function(lambda x: norm(x).sum())
    with pytest.warns(FallbackWarning, match="add_ changes a tensor of torch"):
        step(X)
    step(X)
    step(X)
    assert int(norm.num_batches_tracked) == 3
    close(norm.running_mean, (1 - 0.9**3) * X.mean(0))


@pytest.mark.parametrize("change", ["add_", "__iadd__", "out"])
def test_function_changes_a_tensor_of_torch_once_a_call(change):
    total = torch.zeros(8)
    ways = {"add_": total.add_, "__iadd__": total.__iadd__, "out": lambda x: torch.add(total, x, out=total)}
    step = hl.function(lambda x: (ways[change](x), total * 1)[1])
    with pytest.warns(FallbackWarning, match="changes a tensor of torch"):
        close(step(torch.ones(8)), ones(8))
    close(step(torch.ones(8)), 2 * ones(8))
    close(total, 2 * ones(8))


def test_compiled_function_reads_tensors_of_torch_at_each_call():
    module, scale = torch.nn.Linear(3, 2), torch.ones(2)
    step = hl.function(lambda x: module(x) * scale)
    step(ones(1, 3))
    with torch.no_grad():
        module.weight.fill_(2)
        module.bias.zero_()
    scale.fill_(3)
    close(step(ones(1, 3)), [[18, 18]])
    [trace] = step.traces
    assert trace.compiled


def test_optimizers_of_torch_are_as_before_outside_of_traces():
    weight = torch.nn.Parameter(torch.ones(2))
    hl.function(lambda x: x * 2)(ones(2))
    weight.sum().backward()
    torch.optim.SGD([weight], lr=0.5).step()
    same(numpy(weight), [0.5, 0.5])
