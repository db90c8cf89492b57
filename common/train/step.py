"""One step of training, top to bottom: images -> logits -> losses -> hard samples -> gradient -> weights.

A batch has n images in all processes together, `part` of them here; K of the n are trained on.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError, is_out_of_memory
from common.train.hardware import Hardware
from common.train.losses import hard_samples, ranked_by, sample_losses
from common.train.networks import frozen_statistics
from common.train.run import Run, seed_torch


def train_step(
    run: Run, images: torch.Tensor, targets: torch.Tensor, n: int, share: float, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train on the hardest samples of one batch, in as many micro-batches as memory requires.

    images : (part, 4, h, w) uint8 and targets : (part, n_classes), this process's part of a batch of n
    share : K / n; step : number of the batch in the run, which dropout depends on
    Returns the losses of the whole batch (n,) and the indices of those that were trained on (K,), on the device.
    """
    team, device = run.hardware.team, run.hardware.device
    targets = targets.to(device, non_blocking=True)  # (part, n_classes) float32
    while True:
        attempt = Attempt(run, images, targets, n, step)
        try:
            kept = torch.arange(n, device=device)  # (n,): all of them
            if share < 1:
                ranked = team.gather(attempt.ranked(), n)  # (n,): images -> logits -> losses
                kept = hard_samples(ranked, share)  # (K,) indices of the largest
            factors = torch.zeros(n, device=device).index_fill(0, kept, team.size / len(kept))  # (n,): 1 / K or 0
            losses = team.gather(attempt.backward(factors[team.part(n)]), n)  # (n,); gradients are now summed
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside `except`, so the failed attempt's tensors can be freed. The optimizer has not changed any weight yet.
        del attempt
        run.micro_batch = smaller_micro_batch(run.micro_batch or len(images), run.hardware)
        torch.cuda.empty_cache()
    attempt.keep_finite_statistics(losses)
    regularise(run)  # L1 and the limit on the gradient's norm
    run.scaler.step(run.optimizer)  # new weights
    run.scaler.update()
    if run.average:
        run.average.update(run.model, step)
    return losses, kept


class Attempt:
    """Losses and gradients of one batch in micro-batches; dropping it frees its tensors when out of memory.

    The sampler ranks the whole batch of all processes. With several micro-batches that takes a separate pass, without
    gradients, with the same dropout, and without changing the running statistics.
    """

    def __init__(self, run: Run, images: torch.Tensor, targets: torch.Tensor, n: int, step: int) -> None:
        self.run, self.images, self.targets, self.step = run, images, targets, step
        self.micro = micro_batches(len(images), run.micro_batch, n, run.hardware.team.size)
        self.whole: torch.Tensor | None = None  # losses of an undivided batch, with their graph
        half = run.hardware.autocast == torch.float16
        self.before = [buffer.clone() for buffer in run.model.buffers()] if half else []

    def losses_of(self, k: int, network: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of micro-batch k, (m,), and what the sampler ranks it by, (m,)."""
        run, part = self.run, self.micro[k]
        seed_torch(run.seed, 1, self.step, run.hardware.team.rank, k)  # of dropout
        with run.hardware.casting():
            inputs = run.normalise(self.images[part], run.hardware.device)  # (m, 4, h, w) float32, about -2 to 2
            logits = network(inputs.contiguous(memory_format=run.hardware.memory_format))  # (m, n_classes)
        targets, weights = self.targets[part], run.class_weights
        losses = sample_losses(logits, targets, weights, run.recipe)  # (m,)
        return losses, ranked_by(losses, logits, targets, weights, run.class_counts, run.recipe)

    def ranked(self) -> torch.Tensor:
        """Return what the sampler ranks samples by, (part,), without gradients."""
        run = self.run
        if len(self.micro) == 1:
            self.whole, ranked = self.losses_of(0, run.network)  # (part,) each
            return ranked
        network = run.model if run.hardware.team.size > 1 else run.network
        with torch.no_grad(), frozen_statistics(run.model):
            return torch.cat([self.losses_of(k, network)[1] for k in range(len(self.micro))])  # (part,)

    def backward(self, factors: torch.Tensor) -> torch.Tensor:
        """Sum the gradients of the losses times `factors`, (part,); returns the losses, (part,)."""
        self.run.optimizer.zero_grad(set_to_none=True)
        done = []
        for k, part in enumerate(self.micro):
            with self.gradients_at_the_last(k):
                losses = self.losses_of(k, self.run.network)[0] if self.whole is None else self.whole  # (m,)
                self.run.scaler.scale((losses * factors[part]).sum()).backward()
            done.append(losses.detach())
        return torch.cat(done)

    def gradients_at_the_last(self, k: int) -> AbstractContextManager:
        """Synchronise the gradients of several processes only once, with the last micro-batch."""
        if self.run.hardware.team.size > 1 and k < len(self.micro) - 1:
            return cast(DistributedDataParallel, self.run.network).no_sync()
        return nullcontext()

    def keep_finite_statistics(self, losses: torch.Tensor) -> None:
        """Undo what a batch that overflowed in float16 did to running statistics; the scaler skips its step."""
        if self.before:
            fine = losses.isfinite().all()
            for buffer, old in zip(self.run.model.buffers(), self.before, strict=True):
                buffer.copy_(torch.where(fine, buffer, old))


def micro_batches(n: int, most: int | None, batch: int | None = None, processes: int = 1) -> list[slice]:
    """Return how n images are cut into parts of at most `most`, never one image alone: BatchNorm needs two.

    batch, processes : size of the whole batch and number of processes, which must all have the same number of parts:
        that of the largest n
    """
    largest, smallest = -(-(batch or n) // processes), (batch or n) // processes
    parts = max(1, min(-(-largest // (most or largest)), smallest // 2))
    return [slice(n * k // parts, n * (k + 1) // parts) for k in range(parts)]


def smaller_micro_batch(micro_batch: int, hardware: Hardware) -> int:
    """Return half of a micro-batch that ran out of memory, and print it; raises UserError if nothing fits."""
    half = micro_batch // 2
    if half < 2:
        raise UserError("the GPU is out of memory with two images at once; use a smaller crop: --set crop_size=...")
    if hardware.team.size > 1:  # the others wait in the middle of their step
        raise UserError(f"the GPU is out of memory with {micro_batch} images at once; use --micro-batch {half}")
    print(
        f"out of memory with {micro_batch} images at once: continuing with {half}; the batch keeps its size", flush=True
    )
    return half


def regularise(run: Run) -> None:
    """Add the L1 penalty's gradient and limit the gradient's norm, if the recipe asks for it."""
    recipe = run.recipe
    if not recipe.l1 and not recipe.clip_norm:
        return
    run.scaler.unscale_(run.optimizer)
    for parameter in (p for p in run.model.parameters() if p.requires_grad):
        assert parameter.grad is not None
        parameter.grad.add_(parameter.detach().sign(), alpha=recipe.l1)
    if recipe.clip_norm:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_norm)
