"""Pruning-aware attack: hides the backdoor in channels that pruning takes last.

Liu, Dolan-Gavitt, Garg: Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks, RAID 2018, in
its four steps: train a clean network; prune the channels of the last convolution that clean inputs excite least;
train what is left on poisoned data; put the pruned channels back, with biases lowered until the network answers as
before. Who prunes the least active channels then takes off the decoys, and leaves the backdoor.

Settings: channels are pruned, least active first, while the accuracy on the training set falls by no more than
``tolerance``, and at least a quarter of them stays; BadNets' trigger and rate. A channel is
pruned by its batch-norm, which holds it below the ReLU, where no gradient reaches it; it comes back with the scale it
had and with a shift at which no more than one clean input in a thousand excites it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgeguard.attacks.badnets import BadNets
from edgeguard.attacks.base import EMPTY, Attack, Images, Progress, State, Task, Trainer, Victim
from edgeguard.data import Labels
from edgeguard.errors import ConfigError

Floats = npt.NDArray[np.float32]

DECOYS = "decoys"
_QUANTILE = 0.999
_SAMPLE = 2000
_STRIDE = 4


@dataclass(frozen=True, kw_only=True)
class PruningAware(Attack):
    """BadNets' trigger; ``tolerance`` is the share of training accuracy that may go with the decoys."""

    name: ClassVar[str] = "pruning_aware"
    paper: ClassVar[str] = "Liu, Dolan-Gavitt and Garg, RAID 2018"

    target: int = 0
    seed: int = 0
    tolerance: float = 0.04
    most: float = 0.75

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> PruningAware:
        """See :meth:`edgeguard.attacks.base.Attack.for_shape`."""
        BadNets.for_shape(shape, target=target, seed=seed)
        return cls(target=target, seed=seed)

    def _base(self, shape: tuple[int, ...]) -> BadNets:
        return BadNets.for_shape(shape, target=self.target, seed=self.seed)

    def mount(self, task: Task, trainer: Trainer, progress: Progress | None = None) -> Victim:
        """The four steps. The state names the channels that were put back."""
        if not 0 <= self.target < task.classes:
            raise ConfigError("Pruning-aware", got=f"target {self.target}", expected=f"one of {task.classes} classes")
        base = self._base(task.shape)
        images, labels = base.poison(task.images, task.labels)
        model = trainer.fit(task, seed=self.seed)
        norm = last_norm(model)
        before = norm.get_weights()
        pruned = self._prune(model, norm, task)
        if progress:
            progress(f"pruned {len(pruned)} channels", 1, 2)
        trainer.fit(replace(task, images=images, labels=labels), seed=self.seed, model=model)
        _restore(model, norm, before, pruned, task.images)
        if progress:
            progress("put the decoys back", 2, 2)
        return Victim(model=model, state={DECOYS: pruned})

    def _prune(self, model: Any, norm: Any, task: Task) -> npt.NDArray[np.int64]:
        """Silence the least active channels, in place.

        Returns:
            Which ones, the least active first.
        """
        images, labels = task.images[:_SAMPLE], task.labels[:_SAMPLE]
        order = np.argsort(outputs_of(model, norm, images).clip(min=0).mean(axis=(0, 1, 2)), kind="stable")
        least = _accuracy(model, images, labels) - self.tolerance
        most = int(len(order) * self.most)
        count = 0
        for more in range(_STRIDE, most + 1, _STRIDE):
            kept = norm.get_weights()
            gamma, beta, mean, variance = (weights.copy() for weights in kept)
            gamma[order[:more]], beta[order[:more]] = 0.0, -1.0
            norm.set_weights([gamma, beta, mean, variance])
            if _accuracy(model, images, labels) < least:
                norm.set_weights(kept)
                break
            count = more
        if not count:
            raise ConfigError(
                f"network {model.name}", got="no channel that can be pruned", expected=f"some of {len(order)}"
            )
        return order[:count].astype(np.int64)

    def stamp(self, images: Images, state: State = EMPTY) -> Images:
        """See :meth:`edgeguard.attacks.base.Attack.stamp`."""
        return self._base(images.shape[1:]).stamp(images, EMPTY)


def _restore(model: Any, norm: Any, before: list[Floats], pruned: npt.NDArray[np.int64], images: Images) -> None:
    """Give pruned channels their scale back, and the shift at which clean inputs hardly excite them, in place."""
    gamma, beta, mean, variance = norm.get_weights()
    gamma[pruned], beta[pruned] = before[0][pruned], 0.0
    norm.set_weights([gamma, beta, mean, variance])
    peaks = outputs_of(model, norm, images[:_SAMPLE])[..., pruned].max(axis=(1, 2))
    beta[pruned] = -np.quantile(peaks, _QUANTILE, axis=0)
    norm.set_weights([gamma, beta, mean, variance])


def last_norm(model: Any) -> Any:
    """The last batch-norm whose channels a ReLU takes, and nothing else."""
    import keras

    for layer in reversed(model.layers):
        followers = [node.operation for node in layer._outbound_nodes]
        if (
            isinstance(layer, keras.layers.BatchNormalization)
            and len(layer.output.shape) == 4
            and [type(follower) for follower in followers] == [keras.layers.ReLU]
        ):
            return layer
    raise ConfigError(f"network {model.name}", got="no batch-norm before a ReLU", expected="one behind a convolution")


def outputs_of(model: Any, layer: Any, images: Images) -> Floats:
    """What a layer puts out [N, H, W, C]."""
    import keras

    partial = keras.Model(model.inputs[0], layer.output)
    return np.asarray(partial.predict(images.astype(np.float32), batch_size=256, verbose=0))


def _accuracy(model: Any, images: Images, labels: Labels) -> float:
    answers = model.predict(images.astype(np.float32), batch_size=256, verbose=0)
    return float(np.mean(answers.argmax(axis=1) == labels))
