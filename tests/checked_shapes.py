"""What tests check calls with: that each argument and result has its annotated type and shape."""

import beartype

# As for type checkers, an int is a float, too.
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(function):
    """Leaves `__init__` alone: options check themselves, and JAX fills classes with anything."""
    return function if function.__name__ == "__init__" else _check(function)
