"""Small tools for all packages: argument checks, `every`, progress, findings, patches of other libraries."""
