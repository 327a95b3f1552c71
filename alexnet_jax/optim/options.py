"""The section `config.optimizer`."""

from dataclasses import dataclass
from typing import Literal

from alexnet_jax.errors import InputError
from alexnet_jax.options import Section, fraction, option

_PAIR = "a pattern of parameters and a factor greater than 0 and at most 1e6"


@dataclass(frozen=True)
class OptimizerConfig(Section, section="optimizer"):
    """Optimizer and learning rate schedule; patterns are of parameters, such as "norm*/bias"."""

    name: Literal["adam", "adamw", "sgd", "sgd_2012"] = option(
        "adam", 'Optimizer; "sgd_2012" has the learning rate inside of the momentum.'
    )
    learning_rate: float = option(1e-3, "Peak learning rate.", above=0)
    schedule: Literal["constant", "cosine", "linear", "step", "plateau"] = option(
        "cosine", 'Schedule after warmup; "plateau" depends on the validation accuracy.'
    )
    warmup_epochs: float = option(0.0, "Epochs of linear warmup from 0.", at_least=0)
    end_lr_fraction: float = option(
        0.0, 'Final fraction of the peak in "cosine" and "linear".', at_least=0, at_most=1
    )
    step_epochs: tuple[int, ...] = option(
        (10, 15), 'Epochs at which "step" applies step_factor.', above=0
    )
    step_factor: float = option(
        0.1, 'Factor of the learning rate at a step of "step" or "plateau".', above=0, at_most=1
    )
    plateau_patience: int = option(
        5, 'Epochs without improvement before "plateau" applies step_factor.', at_least=1
    )
    b1: float = fraction(0.9, "Adam: decay rate of the first moment.")
    b2: float = fraction(0.999, "Adam: decay rate of the second moment.")
    eps: float = option(1e-8, "Adam: added to the denominator.", above=0)
    momentum: float = fraction(0.9, "SGD: momentum.")
    nesterov: bool = option(True, "SGD: Nesterov momentum.")
    weight_decay: float = option(
        0.0, "Weight decay of kernels: decoupled in adamw, an L2 penalty in sgd.", at_least=0
    )
    lr_multipliers: tuple[tuple[str, float], ...] = option(
        (),
        'Pairs of a pattern and a factor of the learning rate, such as (("norm*/bias", 10.0),).',
        check=(lambda pair: 0 < pair[1] <= 1e6, _PAIR),
    )
    frozen: tuple[str, ...] = option((), 'Patterns of untrained parameters, such as ("conv*",).')
    muon_learning_rate: float = option(0.0, "Muon: peak learning rate; 0 is off.", at_least=0)
    muon_pattern: str = option("conv*/kernel", "Muon: pattern of the kernels that it trains.")
    muon_momentum: float = fraction(0.95, "Muon: momentum.")
    muon_weight_decay: float = option(0.0, "Muon: decoupled weight decay.", at_least=0)
    muon_normalize_filters: bool = option(
        False, "Muon: rescale its kernels to filters of unit norm, on average, at each update."
    )
    lookahead_period: int = option(
        0, "Lookahead: updates between two of the slow weights; 0 is off.", at_least=0
    )
    lookahead_decay: float = fraction(
        0.5, "Lookahead: fraction of the slow weights that an update of them keeps."
    )
    lookahead_power: float = option(
        0.0, "Lookahead: the decay grows with (updates / all updates) to this power.", at_least=0
    )
    clip_norm: float = option(0.0, "Largest global norm of the gradient; 0 is off.", at_least=0)
    accumulate_steps: int = option(
        1, "Batches whose gradients are averaged for one update.", at_least=1
    )

    def check(self) -> None:
        """Rejects options whose counterpart is off."""
        if self.name == "adam" and self.weight_decay > 0:
            raise InputError(
                f"config.optimizer.weight_decay is {self.weight_decay} and config.optimizer.name "
                "is 'adam', which has none; use 'adamw' for decoupled weight decay."
            )
        if self.muon_normalize_filters and not self.muon_learning_rate:
            raise InputError(
                "config.optimizer.muon_normalize_filters is True and "
                "config.optimizer.muon_learning_rate is 0; set a learning rate to use Muon."
            )
        if self.lookahead_power and not self.lookahead_period:
            raise InputError(
                f"config.optimizer.lookahead_power is {self.lookahead_power} and "
                "config.optimizer.lookahead_period is 0; set a period to use Lookahead."
            )
