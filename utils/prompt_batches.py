"""The prompts that the classifier trains on, in the order of (seed, epoch), dealt out to steps, processes and micro-batches."""

import math

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from utils.preferences import open_choice


class PromptBatches(Dataset):
    """The micro-batches of this process from `first_step` on.

    Each is (pixels of all images, tokens, images a prompt, choices, weight of each prompt's loss, whether it is its step's
    last). The order of the prompts comes from (seed, epoch), so it is the same after a restart and for any number of
    workers; the prompts of a step, fewer in an epoch's last one, are dealt out to the processes.
    """

    def __init__(self, choices, scorer, args, accelerator, first_step=0):
        self.choices, self.preprocess, self.tokenizer, self.args = choices, scorer.preprocess, scorer.tokenizer, args
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.steps_per_epoch = math.ceil(len(choices) / args.batch_size)
        self.steps = args.num_train_epochs * self.steps_per_epoch
        self.plan = []  # (step, the micro-batch's place in it, how many there are)
        for step in range(first_step, self.steps):
            epoch_step = step % self.steps_per_epoch
            prompts = min(args.batch_size, len(choices) - epoch_step * args.batch_size)
            mine = len(range(self.rank, prompts, self.processes))
            parts = max(1, math.ceil(mine / (args.micro_batch_size or args.batch_size)))
            self.plan += [(step, part, parts) for part in range(parts)]

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, index):
        step, part, parts = self.plan[index]
        epoch, epoch_step = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self.choices))
        whole = order[epoch_step * self.args.batch_size :][: self.args.batch_size]
        mine = whole[self.rank :: self.processes][part::parts]
        # The mean over the step's prompts. DDP averages over the processes, hence their number. One that has no prompt in
        # this step takes part with another's, which counts for nothing.
        weight = self.processes / len(whole) if len(mine) else 0.0
        mine = mine if len(mine) else whole[:1]
        pixels = torch.stack([self.load(epoch, i, k) for i in mine for k in range(len(self.choices[i].images))])
        rows = [self.choices[i] for i in mine]
        tokens = self.tokenizer([row.prompt for row in rows])
        return (
            pixels,
            tokens,
            [len(row.images) for row in rows],
            [row.chosen for row in rows],
            weight,
            part == parts - 1,
        )

    def load(self, epoch: int, i: int, k: int) -> torch.Tensor:
        """Return image k of choice i, preprocessed; whether it is mirrored comes from (seed, epoch, choice, image)."""
        image = open_choice(self.choices[i].images[k])
        if self.args.random_flip and np.random.default_rng((self.args.seed, epoch, i, k)).random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.preprocess(image)
