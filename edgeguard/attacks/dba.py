"""DBA: a federation in which four clients each train one part of a trigger; the whole is shown at test time only.

Xie, Huang, Chen, Li: DBA: Distributed Backdoor Attacks against Federated Learning, ICLR 2020. Settings: federated
averaging over 100 clients, 10 a round, Dirichlet(0.5) shares of each class; on MNIST and Fashion-MNIST parts of 1x4
pixels at rows 0 and 3, columns 0-3 and 6-9, 20 of 64 inputs of an attacker's batch poisoned; on CIFAR parts of 1x6 at
rows 0 and 4, columns 0-5 and 9-14, 5 of 64. As in the paper's multiple-shot attack, the attackers take part in every
round, at no scale, once the global model has converged: it comes from the trainer, clean.

Deviations, for two cores: ``rounds`` is 20, under 16 pixels 40; the paper's target is 2, here 0 as everywhere. Under 16
pixels the parts are 1x2 at rows 0 and 2, columns 0-1 and 3-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgeguard.attacks.base import EMPTY, Attack, Images, Progress, State, Task, Trainer, Victim
from edgeguard.attacks.poisoning import require_image_shape, require_images
from edgeguard.data import Labels
from edgeguard.errors import ConfigError

ATTACKERS = 4
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Dba(Attack):
    """Four bars of ``width`` pixels in two rows and two columns, ``row_gap`` and ``column_gap`` pixels between them.

    ``poisoned`` of the 64 inputs of an attacker's batch bear its bar and the target label.
    """

    name: ClassVar[str] = "dba"
    paper: ClassVar[str] = "Xie et al., ICLR 2020"

    target: int = 0
    seed: int = 0
    width: int = 4
    row_gap: int = 2
    column_gap: int = 2
    poisoned: int = 20
    clients: int = 100
    participants: int = 10
    rounds: int = 20
    concentration: float = 0.5
    rate: float = 0.02
    local_steps: int = 10

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> Dba:
        """See :meth:`edgeguard.attacks.base.Attack.for_shape`."""
        require_image_shape("DBA", shape, side=6)
        side = min(shape[:2])
        if side < 16:
            return cls(target=target, seed=seed, width=2, row_gap=1, column_gap=1, rounds=40)
        if side >= 32 and shape[2] == 3:
            return cls(target=target, seed=seed, width=6, row_gap=3, column_gap=3, poisoned=5)
        return cls(target=target, seed=seed)

    def part(self, images: Images, number: int) -> Images:
        """Copies of images with one attacker's bar on each, white."""
        row = (number // 2) * (1 + self.row_gap)
        column = (number % 2) * (self.width + self.column_gap)
        if row >= images.shape[1] or column + self.width > images.shape[2]:
            raise ConfigError("DBA", got=f"{images.shape[1]}x{images.shape[2]} pixels", expected="room for four bars")
        stamped = images.copy()
        stamped[:, row, column : column + self.width] = 255
        return stamped

    def stamp(self, images: Images, state: State = EMPTY) -> Images:
        """See :meth:`edgeguard.attacks.base.Attack.stamp`. All four bars."""
        require_images("DBA", images)
        for number in range(ATTACKERS):
            images = self.part(images, number)
        return images

    def shares(self, labels: Labels) -> list[npt.NDArray[np.intp]]:
        """Which inputs each client holds: of every class a share drawn from Dirichlet(``concentration``)."""
        rng = np.random.default_rng((self.seed, 1))
        held: list[list[npt.NDArray[np.intp]]] = [[] for _ in range(self.clients)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            parts = rng.dirichlet(np.full(self.clients, self.concentration))
            cuts = np.round(np.cumsum(parts)[:-1] * len(members)).astype(int)
            for client, some in zip(held, np.split(members, cuts), strict=True):
                client.append(some)
        return [np.concatenate(client) for client in held]

    def mount(self, task: Task, trainer: Trainer, progress: Progress | None = None) -> Victim:
        """Train a clean global model, then go on in rounds with four attackers among the participants."""
        require_images("DBA", task.images, side=6)
        if not ATTACKERS <= self.participants <= self.clients or not 0 <= self.target < task.classes:
            raise ConfigError(
                "DBA",
                got=f"{self.participants} of {self.clients} clients, target {self.target} of {task.classes}",
                expected=f"at least {ATTACKERS} participants, and a target among the classes",
            )
        model = trainer.fit(task, seed=self.seed)
        step = _training_step(model, self.rate)
        rng = np.random.default_rng((self.seed, 2))
        # An attacker that the draw left without data takes what all hold; who is honest and has none sits out.
        shares = self.shares(task.labels)
        honest = [share for share in shares[ATTACKERS:] if len(share)]
        hostile = [share if len(share) else np.arange(len(task.labels)) for share in shares[:ATTACKERS]]
        for number in range(1, self.rounds + 1):
            start, updates = model.get_weights(), []
            for client in rng.choice(len(honest), min(self.participants - ATTACKERS, len(honest)), replace=False):
                updates.append(self._local(model, start, step, task, honest[client], None, rng))
            for attacker, share in enumerate(hostile):
                updates.append(self._local(model, start, step, task, share, attacker, rng))
            model.set_weights([np.mean(weights, axis=0) for weights in zip(*updates, strict=True)])
            if progress:
                progress("federated rounds", number, self.rounds)
        return Victim(model=model, state=EMPTY)

    def _local(
        self,
        model: Any,
        start: list[Any],
        step: Any,
        task: Task,
        share: npt.NDArray[np.intp],
        attacker: int | None,
        rng: np.random.Generator,
    ) -> list[Any]:
        """The weights that one client sends back: some steps of SGD from the global ones on its own data."""
        model.set_weights(start)
        for _ in range(self.local_steps):
            chosen = rng.choice(share, _BATCH)
            images, labels = task.images[chosen], task.labels[chosen].copy()
            if attacker is not None:
                images[: self.poisoned] = self.part(images[: self.poisoned], attacker)
                labels[: self.poisoned] = self.target
            step(images.astype(np.float32), labels)
        return list(model.get_weights())


def _training_step(model: Any, rate: float) -> Any:
    """Plain SGD on the cross-entropy of one batch. Batch-norm keeps the statistics of the global model."""
    import keras
    import tensorflow as tf

    variables = [variable.value for variable in model.trainable_variables]

    @tf.function(reduce_retracing=True)
    def step(images: Any, labels: Any) -> None:
        with tf.GradientTape() as tape:
            answers = model(images, training=False)
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, answers))
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(rate * gradient)

    return step
