"""What was learned: k-NN and a linear probe on the frozen encoder.

python probe.py knn runs/mapet-textures            an encoder of ours: a run's folder, or any encoder.pt
python probe.py linear runs/mapet-textures
python probe.py linear --random-init --model vit_micro            the floor: the same network, untrained

The encoder is only read: every image goes through it once per view, in eval mode and without gradients, and its weights
and buffers are hashed before and after. The feature of an image is the class token beside the mean of the patch tokens,
after the final norm, as in BEiT's linear probe, which MaPeT follows (METHODS 1.8); the image is its centre square.
    k-NN      cosine similarity, k = 20 votes weighted by exp(similarity / 0.07)               (Wu et al. 2018, DINO)
    linear    one linear layer, AdamW, 50 epochs                                              (settings: `linear`)
Both get features standardised by the training set's mean and deviation, because the two halves differ in scale.
Every image is counted once, however many processes share the work.
"""
import argparse
import hashlib
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2
from tqdm import tqdm

import train
from vit import MODELS, from_weights, read_checkpoint


# --- features -----------------------------------------------------------------------------------------------------

def fingerprint(module):
    """sha256 of all parameters and buffers of a module: equal before and after means that nothing was changed."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class View(Dataset):
    """`ds` through a random augmentation, a function of (seed, index) alone."""

    def __init__(self, ds, augment, *seed):
        self.ds, self.augment, self.seed = ds, augment, seed

    def __len__(self):
        return len(self.ds)

    def __getattr__(self, name):                  # names, mean, std, ...: the data set's own
        return getattr(self.ds, name)

    def __getitem__(self, i):
        image, label, j = self.ds[i]
        return train.augmented(image, self.augment, *self.seed, i), label, j


@torch.inference_mode()
def extract(vit, ds, device, workers=0, batch_size=256):
    """Features (n, 2 d) float32, [class token, mean of patches], and labels (n,) int64 of `ds`, the same on every process.

    Each process encodes every world-th image; the others' rows are zero until the sum over the processes.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    vit = vit.to(device).eval()
    before = fingerprint(vit)
    features = torch.zeros(len(ds), (1 + vit.prefix) * vit.width, device=device)
    mine = range(rank, len(ds), world)
    bar = tqdm(total=len(mine), unit="image", desc=ds.name, leave=False, disable=rank != 0 or not sys.stderr.isatty())
    done = 0
    for images, _, _ in train.batches(ds, mine, batch_size, workers, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = vit(train.normalise(images, ds)).float()
        rows = mine[done:done + len(images)]
        pooled = torch.cat([tokens[:, :vit.prefix].flatten(1), tokens[:, vit.prefix:].mean(1)], 1)
        features[rows.start:rows.stop:world] = pooled
        done += len(images)
        bar.update(len(images))
    bar.close()
    if world > 1:
        dist.all_reduce(features)
    if fingerprint(vit) != before:
        raise RuntimeError("the frozen encoder was changed while features were extracted")
    return features, torch.as_tensor(ds.labels, device=device)


def standardise(train_x, *others):
    """Features (n, d) minus the training set's mean, over its standard deviation, dimension by dimension."""
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-6)
    return [(x - mean) / std for x in (train_x, *others)]


# --- k-NN ---------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def knn(train_x, train_y, test_x, test_y, k=20, temperature=.07, chunk=1024):
    """Top-1 accuracy of weighted k-nearest neighbours under cosine similarity; features (n, d), labels (n,)."""
    k, classes = min(k, len(train_x)), int(train_y.max()) + 1
    bank, correct = F.normalize(train_x, dim=1), 0
    for x, y in zip(F.normalize(test_x, dim=1).split(chunk), test_y.split(chunk)):
        similarity, nearest = (x @ bank.T).topk(k)                              # (chunk, k); never (n, n)
        votes = torch.zeros(len(x), classes, device=x.device)
        votes.scatter_add_(1, train_y[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == y).sum().item()
    return correct / len(test_y)


# --- linear probe -------------------------------------------------------------------------------------------------

def linear(train_x, train_y, test_x, test_y, epochs=50, batch_size=1024, lr=1e-2, weight_decay=1e-4, seed=0):
    """Top-1 accuracy of one linear layer; features (n, d), standardised, labels (n,).

    AdamW, cosine to 0, weights from zero; the test labels are used for nothing but the returned accuracy.
    """
    n, classes = len(train_x), int(train_y.max()) + 1
    head = torch.nn.Linear(train_x.shape[1], classes, device=train_x.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    batch_size = min(batch_size, n)
    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * (n // batch_size))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator).to(train_x.device)
        for rows in order[:n - n % batch_size].split(batch_size):
            F.cross_entropy(head(train_x[rows]), train_y[rows]).backward()
            optimiser.step()
            optimiser.zero_grad()
            plan.step()
    with torch.no_grad():
        return (head(test_x).argmax(1) == test_y).float().mean().item()


def evaluate(vit, train_ds, test_ds, device, workers=0, seed=0, views=1, what=("knn", "linear")):
    """{"knn": ..., "linear": ...}: top-1 accuracies (fractions of 1) of a frozen encoder on a labelled data set.

    views  how often each training image is encoded: once as it is, the others randomly cropped
    """
    train_x, train_y = extract(vit, train_ds, device, workers)
    test_x, test_y = extract(vit, test_ds, device, workers)
    result = {}
    if "knn" in what:
        bank, asked = standardise(train_x, test_x)
        result["knn"] = knn(bank, train_y, asked, test_y)
    if "linear" in what:
        # No flips: the orientation of a texture, as of a digit or a sign elsewhere, is its class.
        crop = v2.RandomResizedCrop(train_ds.image_size, scale=(.3, 1), antialias=True)
        more = [extract(vit, View(train_ds, crop, seed, view), device, workers)[0] for view in range(1, views)]
        x, asked = standardise(torch.cat([train_x, *more]), test_x)
        result["linear"] = linear(x, train_y.repeat(views), asked, test_y, seed=seed)
    return result


# --- command line -------------------------------------------------------------------------------------------------

def open_encoder(args):
    """The encoder that the arguments name, and the settings (dict) of its run, if it has one."""
    folder = args.encoder if os.path.isdir(args.encoder or "") else os.path.dirname(args.encoder or "")
    last = os.path.join(folder, "last.pt")
    settings = read_checkpoint(last).get("args", {}) if args.encoder and os.path.exists(last) else {}
    if args.random_init:
        torch.manual_seed(args.seed)
        if settings:
            return train.build(argparse.Namespace(**{**settings, "seed": args.seed}), 2).encoder, settings
        over = {key: value for key, value in (("image_size", args.image_size), ("patch_size", args.patch_size)) if value}
        return MODELS[args.model](**over), settings
    return from_weights(args.encoder, args.image_size), settings


def main(argv=None):
    parser = argparse.ArgumentParser(description="k-NN or linear probe of a frozen encoder.")
    parser.add_argument("what", choices=["knn", "linear"])
    parser.add_argument("encoder", nargs="?", help="a run's folder, an encoder.pt, a timm/DINO/MAE file or a public name")
    parser.add_argument("--random-init", action="store_true", help="untrained weights: the floor")
    parser.add_argument("--model", choices=list(MODELS), default="vit_micro", help="with --random-init and no encoder")
    parser.add_argument("--data", help="as in train.py (default: what the run was trained on, else textures)")
    parser.add_argument("--classes", metavar="FILE", help="class folders to keep, one a line")
    parser.add_argument("--image-size", type=int, help="pixels a side (default: the encoder's)")
    parser.add_argument("--patch-size", type=int, help="pixels a side, with --random-init")
    parser.add_argument("--views", type=int, default=1, help="linear: encodings of a training image, all but one cropped")
    parser.add_argument("--workers", type=int, default=0, help="loading processes per GPU")
    parser.add_argument("--device", help="cuda, cpu (default: cuda if there is one)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.encoder and not args.random_init:
        parser.error("name a run's folder or an encoder.pt, or say --random-init")
    try:
        rank, _, device = train.setup(args.device)
        vit, settings = open_encoder(args)
        data, classes = args.data or settings.get("data", "textures"), args.classes or settings.get("classes")
        splits = train.open_splits(data, vit.image_size, classes)
        if splits[1] is None:
            raise ValueError(f"--data {data}: a probe needs labels, in train/CLASS/ and in val/CLASS/")
        result = evaluate(vit, *splits, device, args.workers, args.seed, max(1, args.views), (args.what,))
    except (ValueError, OSError) as error:
        parser.exit(2, f"probe.py: error: {error}\n")
    if rank == 0:
        source = (f"random init of {args.encoder}" if args.encoder else f"random {args.model}") if args.random_init \
            else args.encoder
        print(f"{args.what} {100 * result[args.what]:.1f} %   {source}, {splits[1].name}, {len(splits[1])} images")
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main()
