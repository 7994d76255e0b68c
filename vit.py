"""The Vision Transformer (ViT): patches, positions, attention with an optional mask and query-only rows.

    x_0   = [cls ; E patch_1 ; ... ; E patch_n] + pos          (ViT Eq. 1: Dosovitskiy et al. 2021)
    x'_l  = x_{l-1} + Attention(LN(x_{l-1}))                   (ViT Eq. 2)
    x_l   = x'_l + MLP(LN(x'_l))                               (ViT Eq. 3),   output = LN(x_L)

One encoder serves every objective, as the methods differ only in who may look at whom. `encode` takes rows
that were embedded, a boolean mask (rows x keys, True = may attend) and `n_keys`: rows from n_keys on only
ask, they are never looked at. That is the query stream of MaPeT (MaPeT Eq. 3); see `two_stream_mask` in
objectives.py.

Axes, the same letters in every file: b image, n patch, d width, h head, k token id (codebook size K), p patch
side, c class, t target. In an attention: q rows that ask, s rows that are looked at. Parameter names, shapes
and order are timm's, so that files of DINO, DeiT, MAE and timm load here and ours load there.

python vit.py          prints a table: parameters and FLOPs per image of every named size
"""
import argparse
import contextlib
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth


# --- patches: raw, standardized, as gradients -------------------------------------------------------------

def patchify(images, p):
    """(b, 3, H, W) -> (b, n, p*p*3): patches in raster order, values by (row, column, channel), as in MAE."""
    return rearrange(images, "b c (y p) (x q) -> b (y x) (p q c)", p=p, q=p)


def unpatchify(patches, p):
    """(b, n, p*p*3) -> (b, 3, H, W) of a square image: the inverse of `patchify`."""
    side = math.isqrt(patches.shape[1])
    return rearrange(patches, "b (y x) (p q c) -> b c (y p) (x q)", y=side, p=p, q=p)


def gather_patches(x, order):
    """Patches or tokens x (b, n, ...) of each image in its order (b, m) -> (b, m, ...); None: x as it is."""
    if order is None:
        return x
    return x.take_along_dim(order if x.dim() == 2 else order[..., None], 1)


def standardize_patches(images, p):
    """`patchify`, each patch by its own mean and (unbiased) variance: MAE's normalized target, eps 1e-6."""
    x = patchify(images, p)
    var, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt()


def hog(images, p):
    """Histograms of oriented gradients as in MaskFeat's code: (b, 3, S, S) normalized -> (b, n, 27 m^2).

    9 hard bins of unsigned orientation over m x m cells in a patch, 8 pixels a side (or the largest divisor
    of p below it); the 9 bins of a cell and channel have unit length. Order: channel, bin, cell row, column.
    """
    def sobel(x):                                                            # left minus right, smoothed
        slope = x[..., :-2] - x[..., 2:]                                     # first: a flat picture's is 0
        return slope[..., :-2, :] + 2 * slope[..., 1:-1, :] + slope[..., 2:, :]

    cell = max(side for side in range(1, 9) if p % side == 0)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    gx = sobel(padded)
    gy = sobel(padded.mT).mT
    angle_bin = (torch.atan2(gx, gy) / math.pi * 9).floor() % 9              # x first: from the y axis
    magnitude = torch.stack([gx, gy]).norm(dim=0)                            # PeCo: hypot's slope at 0 is NaN
    bins = [F.avg_pool2d(magnitude * (angle_bin == o), cell) for o in range(9)]
    cells = F.normalize(torch.stack(bins, 2), dim=2)                         # (b, c, 9, cell rows, columns)
    return rearrange(cells, "b c o (y i) (x j) -> b (y x) (c o i j)", i=p // cell, j=p // cell)


# What describes a patch without any network: function(normalized images, p) -> (b, n, values).
PATCH_FEATURES = {"pixel": patchify, "pixel-norm": standardize_patches, "hog": hog}

# Mean and standard deviation of the channels, on the scale 0..1.
IMAGENET = (.485, .456, .406), (.229, .224, .225)                            # DINO, DeiT, MAE
CLIP = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
SYMMETRIC = (.5, .5, .5), (.5, .5, .5)                                       # pixels in -1..1: VQ-KD


def normalize(images, mean, std):
    """uint8 (b, 3, S, S) -> float32 (x / 255 - mean) / std by channel; by numbers: no GPU is waited for."""
    channels = [(x / 255 - m) / s for x, m, s in zip(images.unbind(1), mean, std)]
    return torch.stack(channels, 1)


# --- positions --------------------------------------------------------------------------------------------

def sincos_positions(grid, width, prefix=1):
    """Fixed 2-D sine-cosine positions (MAE), (1, prefix + grid*grid, width) float32; 0 for the class token.

    The first half of the width encodes the *column*, the second the row, as in MAE's weights. Each half is
    sin(i w_j) for all j, then cos(i w_j); i the column or row, w_j = 10000^(-j / J), j < J = width / 4.
    """
    frequency = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    angle = torch.arange(grid)[:, None] * 10000 ** -frequency
    axis = torch.cat([angle.sin(), angle.cos()], 1)                          # (grid, width / 2)
    column = axis.repeat(grid, 1)                                            # 0 1 2 0 1 2 0 1 2
    row = axis.repeat_interleave(grid, 0)                                    # 0 0 0 1 1 1 2 2 2
    patches = torch.cat([column, row], 1)
    return F.pad(patches, (0, 0, prefix, 0))[None].float()


def resize_positions(pos, grid, prefix=1):
    """Positions (1, prefix + n, d) -> (1, prefix + grid*grid, d): bicubic, the class token's are kept."""
    first, patches = pos[:, :prefix], pos[:, prefix:]
    side = math.isqrt(patches.shape[1])
    patches = rearrange(patches, "1 (y x) d -> 1 d y x", y=side)
    patches = F.interpolate(patches, grid, mode="bicubic", antialias=grid < side)
    return torch.cat([first, rearrange(patches, "1 d y x -> 1 (y x) d")], 1)


# --- modules, small to large ------------------------------------------------------------------------------

class LayerScale(nn.Module):
    """A learned factor for each channel, at first `init` (CaiT; MaPeT 0.1)."""

    def __init__(self, width, init):
        super().__init__()
        self.gamma = nn.Parameter(init * torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None, n_keys=None, n_out=None):
        """softmax(q k^T / sqrt(e)) v in each head, e = d / h wide: x (b, rows, d) -> (b, n_out or rows, d).

        The last n_out rows ask (None: all), the first n_keys are looked at (None: all). mask (rows, n_keys)
        bool, True = may attend, one for all images and heads. `qkv` gives q, then k, then v, head after head.
        """
        d = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        n_out = n_out or x.shape[1]
        q = F.linear(x[:, -n_out:], weight[:d], bias[:d])
        kv = F.linear(x[:, :n_keys], weight[d:], bias[d:])
        q = rearrange(q, "b q (h e) -> b h q e", h=self.heads)
        k, v = rearrange(kv, "b s (two h e) -> two b h s e", two=2, h=self.heads)
        if mask is not None:
            mask = mask[-n_out:]
        x = F.scaled_dot_product_attention(q, k, v, mask)
        return self.proj(rearrange(x, "b h q e -> b q (h e)"))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each after a norm and beside a shortcut; timm's LayerScale and drop path.

    drop_path   stochastic depth: the probability that a sample skips a branch, with all its rows
    """

    def __init__(self, width, heads, mlp_ratio=4, layer_scale=None, drop_path=0.):
        super().__init__()
        scale = partial(LayerScale, width, layer_scale) if layer_scale else nn.Identity
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, round(width * mlp_ratio))
        self.ls2 = scale()
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, mask=None, n_keys=None, n_out=None):
        """x (b, rows, d) -> (b, n_out or rows, d), of the last n_out rows; arguments as in `Attention`."""
        branch = self.attn(self.norm1(x), mask, n_keys, n_out)
        x = x[:, -branch.shape[1]:] + self.drop_path(self.ls1(branch))       # ViT Eq. 2
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))         # ViT Eq. 3


def drop_rates(drop_path, depth):
    """The stochastic depth of each of `depth` blocks: rises linearly from 0 to `drop_path`."""
    return torch.linspace(0, drop_path, depth, device="cpu").tolist()


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images, order=None):
        """(b, 3, H, W) -> (b, n, d), or only the patches `order` (b, m), in that order -> (b, m, d)."""
        p = self.proj.kernel_size[0]
        patches = rearrange(images, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p)
        weight = self.proj.weight.flatten(1)                                 # the convolution, as a product
        return F.linear(gather_patches(patches, order), weight, self.proj.bias)


class ViT(nn.Module):
    """Normalized images (b, 3, S, S) -> (b, prefix + n, d) after the final norm; class token first, if any.

    pos          "learned" (MaPeT, BEiT, timm) or "sincos" (MAE, ClusterMIM, CAE: fixed, never trained)
    init         "timm" (MaPeT, timm: truncated normal, std 0.02) or "mae" (MAE, ClusterMIM: Xavier-uniform)
    layer_scale  initial value of LayerScale, None = without (timm's default; MaPeT 0.1)
    drop_path    stochastic depth of the last block; earlier blocks rise linearly from 0
    """

    def __init__(self, image_size=224, patch_size=16, width=768, depth=12, heads=12, mlp_ratio=4,
                 layer_scale=None, drop_path=0., pos="learned", cls_token=True, init="timm"):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a multiple of patch size {patch_size}")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.image_size, self.patch_size = image_size, patch_size
        self.width, self.depth, self.heads, self.mlp_ratio = width, depth, heads, mlp_ratio
        self.layer_scale, self.drop_path = layer_scale, drop_path
        self.grid = image_size // patch_size
        self.n_patches = self.grid ** 2
        self.prefix = int(cls_token)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if cls_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + self.n_patches, width))
        self.patch_embed = PatchEmbed(patch_size, width)
        rates = drop_rates(drop_path, depth)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.initialize = {"timm": init_weights, "mae": mae_init}[init]      # of heads and decoders, too
        self.apply(self.initialize)
        if cls_token:
            nn.init.normal_(self.cls_token, std=1e-6 if init == "timm" else .02)
        if pos == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=.02)
        else:
            self.pos_embed.requires_grad_(False).copy_(sincos_positions(self.grid, width, self.prefix))

    def positions(self, order):
        """Positions (b, m, d) of the patches `order` (b, m); None: (1, n, d), of all."""
        return gather_patches(self.pos_embed[:, self.prefix:], order)

    def embed(self, images, order=None):
        """(b, 3, S, S) -> (b, prefix + n, d): class token and patches, positions added (ViT Eq. 1).

        order (b, m): only these patches, in this order -> (b, prefix + m, d)
        """
        if images.shape[-1] != self.image_size:
            raise ValueError(f"images of {images.shape[-1]} pixels, but the ViT is for {self.image_size}")
        x = self.patch_embed(images, order) + self.positions(order)
        if not self.prefix:
            return x
        cls = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls.expand(len(x), -1, -1), x], 1)

    def encode(self, x, mask=None, n_keys=None, n_out=None):
        """All blocks and the final norm: x (b, rows, d) -> (b, n_out or rows, d), as in `Attention`.

        n_out is for the last block only, where no later one looks at the rows that do not ask.
        """
        for block in self.blocks[:-1]:
            x = block(x, mask, n_keys)
        return self.norm(self.blocks[-1](x, mask, n_keys, n_out))

    def forward(self, images):
        return self.encode(self.embed(images))


def init_weights(module):
    """timm's and MaPeT's initialization of a linear layer: truncated normal, std 0.02, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=.02)
        nn.init.zeros_(module.bias)


def mae_init(module):
    """MAE's initialization: Xavier-uniform, bias 0; the patch projection counts as a linear layer."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, PatchEmbed):
        nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))          # a view of the weight


vit_micro = partial(ViT, image_size=48, patch_size=8, width=96, depth=4, heads=3, pos="sincos")
vit_tiny = partial(ViT, width=192, depth=12, heads=3)
vit_small = partial(ViT, width=384, depth=12, heads=6)
vit_base = partial(ViT, width=768, depth=12, heads=12)
vit_large = partial(ViT, width=1024, depth=24, heads=16)
MODELS = {"vit_micro": vit_micro, "vit_tiny": vit_tiny, "vit_small": vit_small, "vit_base": vit_base,
          "vit_large": vit_large}


# --- weights from files and from the web ------------------------------------------------------------------

# Public weights: where, and how their sha256 begins, where the authors say it.
FACEBOOK = "https://dl.fbaipublicfiles.com/"
PUBLIC = {
    "dino_vits16": dict(url=FACEBOOK + "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "dino_vitb16": dict(url=FACEBOOK + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "deit_small": dict(url=FACEBOOK + "deit/deit_small_patch16_224-cd65a155.pth", sha256="cd65a155"),
    "mae_vitb16": dict(url=FACEBOOK + "mae/pretrain/mae_pretrain_vit_base.pth"),  # CC-BY-NC
    "mae_vitl16": dict(url=FACEBOOK + "mae/pretrain/mae_pretrain_vit_large.pth"),  # CC-BY-NC
    "vqkd": dict(url="https://github.com/addf400/files/releases/download/BEiT-v2/"  # BEiT v2's tokenizer, MIT
                     "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth", sha256="d5036aa7"),
}
HEADS = {96: 3, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}                 # of a width; a file does not say
PATCHES = "patch_embed.proj.weight"
PARTS = "cls_token", "pos_embed", "patch_embed.", "blocks.", "norm."
NOT_THE_ENCODER = "head", "fc.", "lm_head", "mask_token", "decoder"


def download(url, sha256=None):
    """The path of `url` in torch.hub's cache, fetched once; its sha256 must begin with what is given."""
    folder = f"{torch.hub.get_dir()}/checkpoints"
    os.makedirs(folder, exist_ok=True)
    path = f"{folder}/{os.path.basename(url)}"
    try:
        if not os.path.exists(path):
            torch.hub.download_url_to_file(url, path, sha256, progress=False)    # atomic, for many ranks
    except (OSError, RuntimeError) as error:                                 # RuntimeError: another hash
        raise ValueError(f"cannot fetch {url} ({error}): put the file at {path} yourself") from None
    return path


def read_checkpoint(path):
    """torch.load(weights_only=True) on the CPU; ValueError, one line, for what it cannot read.

    OSError where there is no file.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):         # in DINO's full checkpoints
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                      # a damaged file raises whatever its bytes happen to say
        said = str(error).split("WeightsUnpickler error: ")[-1].split("\n")[0]
        with open(path, "rb") as file:                                       # OSError, if that is why
            raise ValueError(f"{path}: no checkpoint that torch can read ({said[:200]}); it begins with "
                             f"{file.read(32)!r}: is it the right file, and whole?") from None


def unwrap_weights(checkpoint, path):
    """The state dict in what a file holds, by DDP, torch.compile, DINO, MAE, BEiT, MaPeT or train.py.

    Names are those after the prefix of the first patch embedding: _orig_mod., module., backbone., encoder.
    """
    state = {"file": checkpoint}                                             # which may be no dict
    for container in ("file", "model", "state_dict", "teacher"):             # MAE and DeiT, timm, DINO
        inner = state.get(container)
        if isinstance(inner, dict):
            state = inner
    found = [key for key in state if str(key).endswith(PATCHES)]
    if not found:
        raise ValueError(f"{path}: no weights of a ViT in it ({PATCHES} is missing)")
    prefix = found[0].removesuffix(PATCHES)
    wanted = (prefix, "fc_norm.", "head.")                                   # beside our fine-tuned encoders
    state = {key.removeprefix(prefix): state[key] for key in state if key.startswith(wanted)}
    for key in list(state):
        if key.endswith("attn.q_bias"):                                      # BEiT: keys have no bias
            q, v = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
            state[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
        if ".gamma_" in key:                                                 # BEiT's and CAE's LayerScale
            state[key.replace("gamma_", "ls") + ".gamma"] = state.pop(key)
        if ".attn.q." in key:                                                # MaPeT: q apart from k and v
            q, kv = state.pop(key), state.pop(key.replace(".q.", ".kv."))
            state[key.replace(".q.", ".qkv.")] = torch.cat([q, kv])
    return state


def read_vit(source, name="the weights"):
    """(state dict of a ViT under timm's names, its name in error messages), without heads and decoders.

    source: a public name, a file, a run's folder, or what a file holds. A network that was fine-tuned on the
    mean of its patches (probe.py, MAE, MaPeT) has fc_norm in place of the norm. ValueError for parts that our
    ViT does not have, such as registers: its features would be others.
    """
    if not isinstance(source, dict):
        name = download(**PUBLIC[source]) if source in PUBLIC else str(source)
        if os.path.isdir(name):
            name = f"{name}/encoder.pt"
        source = read_checkpoint(name)
    state = {}
    for key, value in unwrap_weights(source, name).items():
        key = key.replace("fc_norm.", "norm.")
        if key.startswith(PARTS):
            state[key] = value
        elif not key.startswith(NOT_THE_ENCODER):
            raise ValueError(f"{name}: {key} is no part of this ViT: its features would be wrong without it")
    for key in ("pos_embed", "blocks.0.mlp.fc1.bias"):
        if key not in state:
            raise ValueError(f"{name}: no weights of a ViT in it ({key} is missing)")
    return state, name


def load_weights(vit, source, name="the weights"):
    """Load `source`, see `read_vit`, into `vit`, positions resized to its grid; returns it."""
    state, name = read_vit(source, name)
    try:
        state["pos_embed"] = resize_positions(state["pos_embed"], vit.grid, vit.prefix)
        vit.load_state_dict(state)
    except RuntimeError as error:                                            # several lines, of any length
        said = " ".join(str(error).split())
        raise ValueError(f"{name} does not fit this ViT: {said[:300]}") from None
    return vit


def from_weights(source, image_size=None, heads=None):
    """The ViT of `source`, see `read_vit`; the shapes tell its sizes, but not its heads."""
    state, name = read_vit(source)
    width, _, p, _ = state[PATCHES].shape
    heads = heads or HEADS.get(width)
    if not heads:
        raise ValueError(f"{name}: a ViT {width} wide; how many heads it has stands in no file: say --heads")
    cls_token = "cls_token" in state
    grid = math.isqrt(state["pos_embed"].shape[1] - cls_token)
    depth = sum(key.endswith("attn.proj.weight") for key in state)
    mlp_ratio = len(state["blocks.0.mlp.fc1.bias"]) / width
    layer_scale = 1. if "blocks.0.ls1.gamma" in state else None              # its values are in the file
    vit = ViT(image_size or grid * p, p, width, depth, heads, mlp_ratio, layer_scale, cls_token=cls_token)
    return load_weights(vit, state, name)


# --- files, errors, pictures ------------------------------------------------------------------------------

@contextlib.contextmanager
def write_atomically(path):
    """Yields a temporary name, which becomes `path` when the block ends: a kill leaves the old file.

    So does a full disk: OSError, one line, and the temporary file is gone.
    """
    temporary = f"{path}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                                 # RuntimeError: torch.save's
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f"{path} is left as it was, it cannot be written: {error}") from None


def save(state, path):
    """torch.save, atomically."""
    with write_atomically(path) as temporary:
        torch.save(state, temporary)


@contextlib.contextmanager
def exit_on_error(script):
    """Bad input (ValueError) and the machine's errors (OSError) end in one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        line = str(error).strip().split("\n")[-1]                            # a loader's last line says it
        print(f"{script}: error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def load_matplotlib():
    """matplotlib.pyplot, drawing to files; None, and one line that says so, where it is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no pictures: they are drawn by matplotlib (pip install matplotlib)")
    plt.switch_backend("agg")
    return plt


def save_figure(plt, path):
    """The current figure as a PNG, in a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        plt.savefig(temporary, format="png", bbox_inches="tight")
    plt.close()
    print(f"drawn: {path}", flush=True)


def draw_rows(rows, path):
    """PNG of rows of images, of any length: rows {label: (b, 3, S, S) in 0..1}, S the same in all."""
    plt = load_matplotlib()
    if not plt:
        return
    images = nn.utils.rnn.pad_sequence(list(rows.values()), batch_first=True, padding_value=1.)
    images = F.pad(images, (1, 1, 1, 1), value=1.).clamp(0, 1).numpy(force=True)  # white lines between them
    plt.figure(figsize=(10, 10))
    plt.imshow(rearrange(images, "row b c y x -> (row y) (b x) c"))
    plt.yticks(images.shape[-1] * (torch.arange(len(rows)) + .5), list(rows))    # at their centers
    plt.xticks([])
    save_figure(plt, path)


def principal_colors(target, *others):
    """Rows (b, n, d) -> [colors (b, n, 3) in 0..1: their three principal components; `others` by the same].

    Two standard deviations to either side are the whole range; gray is the mean.
    """
    rows = target.flatten(0, 1).float()
    mean = rows.mean(0)
    axes = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:3].T       # (d, 3)
    spread = 4 * ((rows - mean) @ axes).std(0) + 1e-5                        # if constant: gray, not rounding
    return [((x.float() - mean) @ axes / spread + .5).clamp(0, 1) for x in (target, *others)]


def main():
    for name, build in MODELS.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter:    # nothing is computed
            vit = build()
            vit(torch.empty(1, 3, vit.image_size, vit.image_size))
        gflops = counter.get_total_flops() / 1e9                             # a multiply-add counts as two
        params = sum(p.numel() for p in vit.parameters()) / 1e6
        print(f"{name:<10} {vit.n_patches} patches, {vit.depth:>2} blocks {vit.width:>4} wide: {params:.2f}M "
              f"parameters, {gflops:6.2f} GFLOPs an image")


if __name__ == "__main__":
    main()
