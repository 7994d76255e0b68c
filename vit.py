"""The Vision Transformer (ViT): patches, positions, attention with an optional mask and optional query-only rows.

    x_0     = [cls ; E patch_1 ; ... ; E patch_n] + pos                     (Dosovitskiy et al. 2021, Eq. 1)
    x'_l    = x_{l-1} + LayerScale(Attention(LN(x_{l-1})))                  (Eq. 2)
    x_l     = x'_l + LayerScale(MLP(LN(x'_l)))                              (Eq. 3),   output = LN(x_L)

One encoder serves every objective, because the methods differ only in who may look at whom. `encode` takes rows that
were already embedded, a boolean mask (rows x keys, True = may attend) and `n_keys`: rows from n_keys on only ask, they
are never looked at. That is MaPeT's query stream (MaPeT Eq. 3); see `two_stream_mask` in objectives.py.

Axes, the same letters in every file: b image, n patch, d width, h head, k token id (codebook size K), p patch side,
c class, t target. In an attention: q rows that ask, s rows that are looked at.
Parameter names, shapes and order are timm's, so that DINO, DeiT, MAE and timm files load here and ours load there.

python vit.py          prints a table: parameters and FLOPs per image of every named size
"""
import argparse
import functools
import hashlib
import math
import os
import pickle
import urllib.error
import zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce
from torch.utils.flop_counter import FlopCounterMode

# Public weights: where, what they fit, and the hash that their authors published (DINO's published none).
FACEBOOK = "https://dl.fbaipublicfiles.com/"
PUBLIC = {
    "dino_vits16": (FACEBOOK + "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", {}),
    "dino_vitb16": (FACEBOOK + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", {}),
    "deit_small": (FACEBOOK + "deit/deit_small_patch16_224-cd65a155.pth", {"sha256": "cd65a155"}),
    "mae_vitb16": (FACEBOOK + "mae/pretrain/mae_pretrain_vit_base.pth", {"md5": "8cad7c"}),         # CC-BY-NC
    "mae_vitl16": (FACEBOOK + "mae/pretrain/mae_pretrain_vit_large.pth", {"md5": "b8b06e"}),        # CC-BY-NC
}
HEADS = {96: 3, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}      # a state dict tells every size but the head count


# --- patches and positions ---------------------------------------------------------------------------------------

def patchify(images, p):
    """(b, 3, H, W) -> (b, n, p*p*3): patches in raster order, values in MAE's (row, column, channel) order."""
    return rearrange(images, "b c (y p) (x q) -> b (y x) (p q c)", p=p, q=p)


def unpatchify(patches, p):
    """(b, n, p*p*3) -> (b, 3, H, W) of a square image: the inverse of `patchify`."""
    side = math.isqrt(patches.shape[1])
    return rearrange(patches, "b (y x) (p q c) -> b c (y p) (x q)", y=side, x=side, p=p, q=p)


def standardised(images, p):
    """`patchify`, each patch by its own mean and (unbiased) variance: MAE's normalised target, eps 1e-6."""
    x = patchify(images, p)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()


def hog(images, p):
    """Histograms of oriented gradients as in MaskFeat (METHODS 7): (b, 3, S, S) normalised -> (b, n, 27 m^2).

    9 hard bins of unsigned orientation over m x m cells in a patch, 8 pixels a side (or the largest divisor of p below
    it); the 9 bins of each cell and channel have unit length. Values in (channel, bin, cell row, cell column) order.
    """
    cell = next(side for side in range(8, 0, -1) if p % side == 0)
    step = torch.arange(1., -2., -1., device=images.device)
    sobel = (2 - step.abs())[:, None] * step                            # [1 2 1] down, [1 0 -1] across
    images = F.pad(images, (1, 1, 1, 1), mode="reflect")
    gx, gy = (F.conv2d(images, kernel.repeat(3, 1, 1, 1), groups=3) for kernel in (sobel, sobel.T))
    bins = (torch.atan2(gx, gy) / math.pi * 9).floor() % 9              # x first: the angle is measured from the y axis
    magnitude = torch.hypot(gx, gy)
    cells = [reduce(magnitude * (bins == o), "b c (y i) (x j) -> b c y x", "sum", i=cell, j=cell) for o in range(9)]
    cells = F.normalize(torch.stack(cells, 2), dim=2)
    return rearrange(cells, "b c o (y i) (x j) -> b (y x) (c o i j)", i=p // cell, j=p // cell)


# What a patch can be described by without any network: function(images normalised, p) -> (b, n, values).
PATCH_FEATURES = {"pixel": patchify, "pixel-norm": standardised, "hog": hog}


def sincos_positions(grid, width, prefix=1):
    """Fixed 2-D sine-cosine positions, (1, prefix + grid*grid, width) float32, zeros for the class token (MAE).

    The first half of the width encodes the *column*, the second the row, as in MAE's released weights.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, not {width}")
    omega = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], 1)                           # (grid, width / 2)
    column, row = axis.expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)
    patches = rearrange(torch.cat([column, row], -1), "y x d -> (y x) d")
    return F.pad(patches, (0, 0, prefix, 0))[None].float()


def resize_positions(pos, grid, prefix=1):
    """Learned or fixed positions (1, prefix + n, d) -> (1, prefix + grid*grid, d): bicubic, the class slot kept."""
    first, patches = pos[:, :prefix], pos[:, prefix:]
    side = math.isqrt(patches.shape[1])
    patches = rearrange(patches.float(), "1 (y x) d -> 1 d y x", y=side)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=grid < side)
    return torch.cat([first, rearrange(patches, "1 d y x -> 1 (y x) d").to(pos.dtype)], 1)


@functools.lru_cache
def channels(values, device):
    """Three numbers, as (3, 1, 1) on the device: copied there once, because each copy makes the CPU wait for a GPU."""
    with torch.inference_mode(False):                                   # wherever the first call comes from
        return torch.tensor(values, device=device).view(3, 1, 1)


def normalise(images, source):
    """uint8 (b, 3, S, S) on any device -> float32, by .mean and .std of `source`: a data set, a tokenizer."""
    mean, std = (channels(values, images.device) for values in (source.mean, source.std))
    return (images.float() / 255 - mean) / std


def take(x, order):
    """x (b, n, ...), order (b, m) -> (b, m, ...): the patches (or positions, or tokens) of each image, in its order."""
    index = order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


# --- modules, small to large --------------------------------------------------------------------------------------

def drop_path(x, rate, noise):
    """Stochastic depth: a sample whose noise (b,), uniform in [0, 1), is below `rate` loses this branch.

    One draw per sample covers all its rows, hence both streams of MaPeT (METHODS 1.4). Kept branches are scaled up.
    """
    if noise is None or rate == 0:
        return x
    return x * rearrange((noise >= rate) / (1 - rate), "b -> b 1 1").to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None, n_keys=None, n_out=None):
        """x (b, rows, d) -> (b, n_out or rows, d). The last n_out rows ask; the first n_keys rows are looked at.

        mask (rows, n_keys) bool, True = may attend, one for all images and heads.
        """
        d = x.shape[-1]
        ask = slice(None) if n_out is None else slice(-n_out, None)
        q = F.linear(x[:, ask], self.qkv.weight[:d], self.qkv.bias[:d])
        kv = F.linear(x[:, :n_keys], self.qkv.weight[d:], self.qkv.bias[d:])
        q = rearrange(q, "b q (h d) -> b h q d", h=self.heads)
        k, v = rearrange(kv, "b s (two h d) -> two b h s d", two=2, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[ask])
        return self.proj(rearrange(x, "b h q d -> b q (h d)"))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(init)))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width, heads, mlp_ratio=4, layer_scale=None, drop=0.):
        super().__init__()
        scale = lambda: nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop = drop
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.ls2 = scale()

    def forward(self, x, mask=None, n_keys=None, n_out=None, noise=(None, None)):
        y = self.attn(self.norm1(x), mask, n_keys, n_out)
        x = x if n_out is None else x[:, -n_out:]
        x = x + drop_path(self.ls1(y), self.drop, noise[0])
        return x + drop_path(self.ls2(self.mlp(self.norm2(x))), self.drop, noise[1])


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images, order=None):
        """(b, 3, H, W) -> (b, n, d), or only the patches `order` (b, m), in that order -> (b, m, d)."""
        p = self.proj.kernel_size[0]
        patches = rearrange(images, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p)
        patches = patches if order is None else take(patches, order)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)      # the convolution, as a matrix product


class ViT(nn.Module):
    """images (b, 3, S, S), normalised -> (b, prefix + n, d) after the final norm; class token first if there is one.

    pos          "learned" (MaPeT, BEiT, timm) or "sincos" (MAE, ClusterMIM, CAE: fixed, never trained)
    init         "timm" (MaPeT, timm: truncated normal, std 0.02) or "mae" (MAE, ClusterMIM: Xavier-uniform)
    layer_scale  initial value of LayerScale, None = without (timm's default; MaPeT 0.1)
    drop_path    stochastic-depth rate of the last block; earlier blocks rise linearly from 0
    """

    def __init__(self, image_size=224, patch_size=16, width=768, depth=12, heads=12, mlp_ratio=4, layer_scale=None,
                 drop_path=0., pos="learned", cls_token=True, init="timm"):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a multiple of patch size {patch_size}")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        if pos not in ("learned", "sincos"):
            raise ValueError(f'pos must be "learned" or "sincos", not {pos!r}')
        if init not in ("timm", "mae"):
            raise ValueError(f'init must be "timm" or "mae", not {init!r}')
        self.image_size, self.patch_size, self.width, self.depth = image_size, patch_size, width, depth
        self.grid, self.prefix = image_size // patch_size, int(cls_token)
        self.n_patches, self.layer_scale = self.grid ** 2, layer_scale
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if cls_token else None
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, width, self.prefix) if pos == "sincos" else
                                      torch.zeros(1, self.prefix + self.n_patches, width), requires_grad=pos == "learned")
        self.patch_embed = PatchEmbed(patch_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale, drop_path * i / max(depth - 1, 1))
                                    for i in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights if init == "timm" else mae_init)
        if cls_token:
            nn.init.normal_(self.cls_token, std=1e-6 if init == "timm" else .02)
        if pos == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=.02)

    def positions(self, order):
        """Positions (b, m, d) of the patches `order` (b, m)."""
        return take(self.pos_embed[:, self.prefix:].expand(len(order), -1, -1), order)

    def embed(self, images, order=None):
        """(b, 3, S, S) -> (b, prefix + n, d): class token and patches, positions added.

        order (b, m): only these patches, in this order -> (b, prefix + m, d)
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images are {tuple(images.shape[-2:])}, this ViT was built for {self.image_size}")
        x = self.patch_embed(images, order)
        x = x + (self.pos_embed[:, self.prefix:] if order is None else self.positions(order))
        if not self.prefix:
            return x
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)

    def encode(self, x, mask=None, n_keys=None, n_out=None, noise=None):
        """All blocks and the final norm: x (b, rows, d) -> (b, n_out or rows, d).

        mask    (rows, n_keys) bool, True = may attend; None = every row sees the first n_keys rows
        n_keys  rows from here on are queries only: they attend and are never attended to; None = all rows are keys
        n_out   only the last n_out rows are wanted: the last block computes keys and values for all, and nothing else
                for the other rows
        noise   (2 * depth, b) uniform numbers that decide stochastic depth; drawn here when None and training
        """
        if noise is None and self.training and self.blocks[-1].drop > 0:
            noise = torch.rand(2 * self.depth, len(x), device=x.device)
        for i, block in enumerate(self.blocks):
            last = i == self.depth - 1
            drop = (None, None) if noise is None else noise[2 * i:2 * i + 2]
            x = block(x, mask, n_keys, n_out if last else None, drop)
        return self.norm(x)

    def forward(self, images):
        return self.encode(self.embed(images))


def init_weights(module):
    """timm's and MaPeT's initialisation of a linear layer: truncated normal, std 0.02, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=.02)
        nn.init.zeros_(module.bias)


def mae_init(module):
    """MAE's initialisation: linear layers Xavier-uniform, bias 0; the patch projection counts as a linear layer."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, PatchEmbed):
        nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))     # a view: the weight itself is filled


def vit_micro(**over):          # the embedded default: trains on two CPU cores
    return ViT(**{**dict(image_size=48, patch_size=8, width=96, depth=4, heads=3, pos="sincos"), **over})


def vit_tiny(**over):
    return ViT(**{**dict(width=192, depth=12, heads=3), **over})


def vit_small(**over):
    return ViT(**{**dict(width=384, depth=12, heads=6), **over})


def vit_base(**over):
    return ViT(**{**dict(width=768, depth=12, heads=12), **over})


def vit_large(**over):
    return ViT(**{**dict(width=1024, depth=24, heads=16), **over})


MODELS = {f.__name__: f for f in (vit_micro, vit_tiny, vit_small, vit_base, vit_large)}


# --- weights from files and from the web -------------------------------------------------------------------------

def download(url, sha256="", md5=""):
    """The local path of `url` in torch.hub's cache, fetched at the first call; a hash (prefix) that differs is an error."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fetched = path if os.path.exists(path) else f"{path}.{os.getpid()}"       # several ranks may fetch: each its own file
    try:
        if fetched != path:
            torch.hub.download_url_to_file(url, fetched, progress=False)
        for kind, wanted in (("sha256", sha256), ("md5", md5)):
            if wanted and not file_hash(fetched, kind).startswith(wanted):
                raise OSError(f"the {kind} of {fetched} does not begin with {wanted}")
        os.replace(fetched, path)
    except (urllib.error.URLError, OSError) as error:
        if fetched != path and os.path.exists(fetched):
            os.remove(fetched)
        raise ValueError(f"cannot fetch {url} ({error}): put the right file at {path} yourself") from None
    return path


def file_hash(path, kind):
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def save(state, path):
    """torch.save, atomically: a kill while writing leaves the old file."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def read_checkpoint(path):
    """torch.load(weights_only=True) on the CPU; anything that is not a readable checkpoint is a one-line ValueError."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):          # DINO's full checkpoints hold one
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}); was it cut short?") from None


def read_vit_weights(name_or_path):
    """The ViT part of a public file, of a timm/DINO/DeiT/MAE checkpoint or of a run of ours, under timm's names."""
    if name_or_path in PUBLIC:
        url, check = PUBLIC[name_or_path]
        name_or_path = download(url, **check)
    path = os.path.join(name_or_path, "encoder.pt") if os.path.isdir(name_or_path) else name_or_path
    state = read_checkpoint(path)
    for container in ("model", "state_dict", "teacher", "student"):           # MAE and DeiT, timm, DINO
        if isinstance(state, dict) and isinstance(state.get(container), dict):
            state = state[container]
            break
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: no ViT weights in it")
    for prefix in ("module.", "backbone.", "encoder."):                       # DDP, DINO, the objectives of this repo
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    # Heads, decoders and mask tokens are not the encoder's; what is left must fit exactly.
    return {key: v for key, v in state.items()
            if key.split(".")[0] in ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")}, path


def load_weights(vit, name_or_path):
    """Load a public name (`PUBLIC`), a file or a run folder into `vit` and return it; positions are resized to its grid.

    ValueError, naming the file and the first keys that differ, if the file does not fit; `vit` is then untouched.
    """
    state, path = read_vit_weights(name_or_path)
    own = vit.state_dict()
    if "pos_embed" in state and state["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
        if math.isqrt(state["pos_embed"].shape[1] - vit.prefix) ** 2 == state["pos_embed"].shape[1] - vit.prefix:
            state["pos_embed"] = resize_positions(state["pos_embed"], vit.grid, vit.prefix)
    differ = [f"{key} missing" for key in own if key not in state]
    differ += [f"{key} unknown" for key in state if key not in own]
    differ += [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in own
               if key in state and state[key].shape != own[key].shape]
    if differ:
        raise ValueError(f"{path} does not fit this ViT: {', '.join(differ[:3])}" +
                         (f" and {len(differ) - 3} more" if len(differ) > 3 else ""))
    vit.load_state_dict(state)
    return vit


def from_weights(name_or_path, image_size=None):
    """The ViT that a file (or public name, or run folder) was made from, with its weights; sizes read off the shapes."""
    state, path = read_vit_weights(name_or_path)
    try:
        width, _, p, _ = state["patch_embed.proj.weight"].shape
        prefix = int("cls_token" in state)
        grid = math.isqrt(state["pos_embed"].shape[1] - prefix)
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        mlp_ratio = len(state["blocks.0.mlp.fc1.bias"]) / width
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: no ViT weights in it (missing {error})") from None
    vit = ViT(image_size or grid * p, p, width, depth, HEADS.get(width, max(1, width // 64)), mlp_ratio, cls_token=bool(prefix),
              layer_scale=1. if "blocks.0.ls1.gamma" in state else None)
    return load_weights(vit, path)


def count_flops(function, *inputs):
    """Floating-point operations of one call (a multiply-add counts as two); meta tensors cost nothing."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)
    return counter.get_total_flops()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Parameters and FLOPs per image of every named ViT.")
    parser.add_argument("--image-size", type=int, help="pixels a side (default: 224; vit_micro 48)")
    parser.add_argument("--patch-size", type=int, help="pixels a side (default: 16; vit_micro 8)")
    args = parser.parse_args(argv)
    over = {key: value for key, value in vars(args).items() if value}
    print(f"{'model':<10} {'image':>5} {'patch':>5} {'patches':>7} {'width':>5} {'depth':>5} {'params':>9} {'GFLOPs/image':>12}")
    for name, build in MODELS.items():
        try:
            with torch.device("meta"):
                vit = build(**over)
                flops = count_flops(vit, torch.empty(1, 3, vit.image_size, vit.image_size))
        except ValueError as error:
            parser.exit(2, f"vit.py: error: {error}\n")
        params = sum(p.numel() for p in vit.parameters())
        print(f"{name:<10} {vit.image_size:>5} {vit.patch_size:>5} {vit.n_patches:>7} {vit.width:>5} {vit.depth:>5} "
              f"{params / 1e6:>8.2f}M {flops / 1e9:>12.2f}")


if __name__ == "__main__":
    main()
