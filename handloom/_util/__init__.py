"""Small tools that every wing uses: argument checks, `every`, progress, findings, patches of other libraries."""
