"""What the rest of the trainer knows of what is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from diffusion_api.combinations import Kind
from diffusion_trainer.methods.conditioning import TextPath
from diffusion_trainer.methods.dropout import Masks
from diffusion_trainer.optim import Group


@dataclass(frozen=True)
class Attached:
    """What a method made trainable in a family, in place.

    Names of parameters are those of checkpoints and exports: `<path in the denoiser>`, and
    `text_encoder[_2].<path in that encoder>`, where paths are as in published files.
    """

    kind: Kind
    groups: tuple[Group, ...]
    modules: tuple[nn.Module, ...]
    """The networks that gradients pass through: in training mode while a step is computed, else in evaluation mode."""
    text: TextPath
    masks: Masks = field(default_factory=Masks)
    after_update: Callable[[], None] = lambda: None
    """What is done to the weights after each update of the optimizer."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all that is trained, sorted by name; fp32 whatever the rest is."""
        every = [item for group in self.groups for item in group.parameters.items()]
        return dict(sorted(every))

    def train(self, *, mode: bool = True) -> None:
        """Put what is trained into training mode, or into that of evaluation."""
        for module in self.modules:
            module.train(mode)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Stay in the mode of evaluation, and go back into that of training."""
        self.train(mode=False)
        try:
            yield
        finally:
            self.train()


def named_group(
    parameters: Iterable[tuple[str, nn.Parameter]], *, lr_scale: float = 1.0, decayed: bool = True
) -> Group:
    """Return a group with its parameters sorted by name."""
    return Group(dict(sorted(parameters)), lr_scale=lr_scale, decayed=decayed)
