"""The Vision Transformer (ViT): patches, positions, attention with optional mask and query-only rows.

    x_0     = [cls ; E patch_1 ; ... ; E patch_n] + pos              (ViT Eq. 1: Dosovitskiy et al. 2021)
    x'_l    = x_{l-1} + LayerScale(Attention(LN(x_{l-1})))           (ViT Eq. 2)
    x_l     = x'_l + LayerScale(MLP(LN(x'_l)))                       (ViT Eq. 3),   output = LN(x_L)

One encoder serves every objective, as the methods differ only in who may look at whom. `encode` takes rows that
were embedded, a boolean mask (rows x keys, True = may attend) and `n_keys`: rows from n_keys on only ask, they are
never looked at. That is the query stream of MaPeT (MaPeT Eq. 3); see `two_stream_mask` in objectives.py.

Axes, the same letters in every file: b image, n patch, d width, h head, k token id (codebook size K), p patch
side, c class, t target. In an attention: q rows that ask, s rows that are looked at. Parameter names, shapes
and order are timm's, so that DINO, DeiT, MAE and timm files load here and ours load there.

Read down to the ruled line: patches, positions, modules, ViT. Below it, to be skipped at first: weights from
files, frozen features of patches (HOG, CLIP, a ViT), safe writing, pictures.

python vit.py          prints a table: parameters and FLOPs per image of every named size
"""
import argparse
import contextlib
import functools
import hashlib
import math
import os
import re
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid


# --- patches and positions --------------------------------------------------------------------------------

def patchify(images, p):
    """(b, 3, H, W) -> (b, n, p*p*3): patches in raster order, values by (row, column, channel), as MAE."""
    return rearrange(images, "b c (y p) (x q) -> b (y x) (p q c)", p=p, q=p)


def unpatchify(patches, p):
    """(b, n, p*p*3) -> (b, 3, H, W) of a square image: the inverse of `patchify`."""
    side = math.isqrt(patches.shape[1])
    return rearrange(patches, "b (y x) (p q c) -> b c (y p) (x q)", y=side, x=side, p=p, q=p)


def gather_patches(x, order):
    """x (b, n, ...), order (b, m) -> (b, m, ...): patches (positions, tokens) of each image, in its order."""
    index = order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def sincos_positions(grid, width, prefix=1):
    """Fixed 2-D sine-cosine positions (MAE), (1, prefix + grid*grid, width) float32; 0 for the class token.

    The first half of the width encodes the *column*, the second the row, as in MAE's weights. Each half is
    sin(i w_j) for all j, then cos(i w_j); i the column or row, w_j = 10000^(-j / J), j = 0..J-1, J = width / 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, not {width}")
    omega = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], 1)                           # (grid, width / 2)
    column, row = axis.expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)
    patches = rearrange(torch.cat([column, row], -1), "y x d -> (y x) d")
    return F.pad(patches, (0, 0, prefix, 0))[None].float()


# --- modules, small to large ------------------------------------------------------------------------------

def add_branch(x, branch, inputs, rate, noise):
    """x + branch(*inputs) with stochastic depth: samples whose noise, uniform in [0, 1), is below `rate` stay x.

    noise (b,) or None. One draw per sample covers all its rows, hence both streams of MaPeT. Kept branches are
    scaled up. On the CPU the others are not computed; a GPU would have to wait to learn which these are.
    """
    if noise is None or rate == 0:
        return x + branch(*inputs)
    keep, scale = noise >= rate, 1 / (1 - rate)
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and 0 < keep.sum() < len(x):
        y = branch(*(rows[keep] for rows in inputs))
        return x.index_add(0, keep.nonzero()[:, 0], y.to(x.dtype), alpha=scale)
    return x + branch(*inputs) * rearrange(keep * scale, "b -> b 1 1").to(x.dtype)


class LayerScale(nn.Module):
    """A factor gamma for each channel, at first `init`; None: without. Blocks do the same by `fold_scale`."""

    def __init__(self, width, init):
        super().__init__()
        self.gamma = None if init is None else nn.Parameter(torch.full((width,), float(init)))

    def forward(self, x):
        return x if self.gamma is None else x * self.gamma


def fold_scale(layer, gamma):
    """weight, bias of gamma * layer(x), gamma (d,) or None: with LayerScale a linear layer is still one.

    gamma (W x + b) = (gamma W) x + gamma b, and W x + b need not be kept for the backward pass.
    """
    if gamma is None:
        return layer.weight, layer.bias
    return gamma[:, None] * layer.weight, gamma * layer.bias


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None, n_keys=None, n_out=None, gamma=None):
        """x (b, rows, d) -> (b, n_out or rows, d). The last n_out rows ask, the first n_keys are looked at.

        mask (rows, n_keys) bool, True = may attend, one for all images and heads. softmax(q k^T / sqrt(d / h)) v:
        the outputs of `qkv` are all of q, then of k, then of v, each head after head. gamma (d,): LayerScale's.
        """
        d = x.shape[-1]
        ask = slice(None) if n_out is None else slice(-n_out, None)
        q = F.linear(x[:, ask], self.qkv.weight[:d], self.qkv.bias[:d])
        kv = F.linear(x[:, :n_keys], self.qkv.weight[d:], self.qkv.bias[d:])
        q = rearrange(q, "b q (h d) -> b h q d", h=self.heads)
        k, v = rearrange(kv, "b s (two h d) -> two b h s d", two=2, h=self.heads)
        # One call, one mask: rows without a mask in a call of their own, or targets in windows of the keys they
        # see, would save 1 % of a step on the CPU (measured; on a GPU not).
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[ask])
        return F.linear(rearrange(x, "b h q d -> b q (h d)"), *fold_scale(self.proj, gamma))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x, gamma=None):
        """gamma * fc2(gelu(fc1 x)), in less memory."""
        return gelu_linear(self.fc1(x), *fold_scale(self.fc2, gamma))


def split_noise(noise, depth):
    """noise (2 depth, b) or None -> for each of `depth` blocks the draws of its two branches."""
    return [(None, None)] * depth if noise is None else noise.split(2)


def drop_rates(last, depth):
    """Stochastic depth of each of `depth` blocks: linear from 0 to the last one's."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


class Block(nn.Module):
    def __init__(self, width, heads, mlp_ratio=4, layer_scale=None, drop=0.):
        super().__init__()
        self.drop = drop
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.ls2 = LayerScale(width, layer_scale)

    def forward(self, x, mask=None, n_keys=None, n_out=None, noise=(None, None)):
        attend = lambda x: self.attn(self.norm1(x), mask, n_keys, n_out, self.ls1.gamma)
        mlp = lambda x: self.mlp(self.norm2(x), self.ls2.gamma)
        x = add_branch(x if n_out is None else x[:, -n_out:], attend, [x], self.drop, noise[0])
        return add_branch(x, mlp, [x], self.drop, noise[1])


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images, order=None):
        """(b, 3, H, W) -> (b, n, d), or only the patches `order` (b, m), in that order -> (b, m, d)."""
        p = self.proj.kernel_size[0]
        patches = rearrange(images, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p)
        patches = patches if order is None else gather_patches(patches, order)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # the convolution, as a product


class ViT(nn.Module):
    """Normalized images (b, 3, S, S) -> (b, prefix + n, d) after the final norm; class token first, if any.

    pos          "learned" (MaPeT, BEiT, timm) or "sincos" (MAE, ClusterMIM, CAE: fixed, never trained)
    init         "timm" (MaPeT, timm: truncated normal, std 0.02) or "mae" (MAE, ClusterMIM: Xavier-uniform)
    layer_scale  initial value of LayerScale, None = without (timm's default; MaPeT 0.1)
    drop_path    stochastic-depth rate of the last block; earlier blocks rise linearly from 0
    """

    def __init__(self, image_size=224, patch_size=16, width=768, depth=12, heads=12, mlp_ratio=4,
                 layer_scale=None, drop_path=0., pos="learned", cls_token=True, init="timm"):
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
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + self.n_patches, width))
        self.patch_embed = PatchEmbed(patch_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale, rate)
                                    for rate in drop_rates(drop_path, depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.initialize = init_weights if init == "timm" else mae_init   # for heads and decoders, too
        self.apply(self.initialize)
        if cls_token:
            nn.init.normal_(self.cls_token, std=1e-6 if init == "timm" else .02)
        if pos == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=.02)
        else:
            fixed = sincos_positions(self.grid, width, self.prefix)
            self.pos_embed = nn.Parameter(fixed, requires_grad=False)

    def positions(self, order):
        """Positions (b, m, d) of the patches `order` (b, m)."""
        return gather_patches(self.pos_embed[:, self.prefix:].expand(len(order), -1, -1), order)

    def embed(self, images, order=None):
        """(b, 3, S, S) -> (b, prefix + n, d): class token and patches, positions added.

        order (b, m): only these patches, in this order -> (b, prefix + m, d)
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images are {tuple(images.shape[-2:])}, the ViT is for {self.image_size} pixels")
        x = self.patch_embed(images, order)
        x = x + (self.pos_embed[:, self.prefix:] if order is None else self.positions(order))
        if not self.prefix:
            return x
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)

    def encode(self, x, mask=None, n_keys=None, n_out=None, noise=None):
        """All blocks and the final norm: x (b, rows, d) -> (b, n_out or rows, d).

        mask    (rows, n_keys) bool, True = may attend; None = every row sees the first n_keys rows
        n_keys  rows from here on are queries only: they attend and are never attended to; None = all are keys
        n_out   only the last n_out rows are wanted: of the others the last block computes keys and values
        noise   (2 * depth, b) uniform numbers that decide stochastic depth; drawn here when None and training
        """
        if noise is None and self.training and self.blocks[-1].drop > 0:
            noise = torch.rand(2 * self.depth, len(x), device=x.device)
        for i, (block, draws) in enumerate(zip(self.blocks, split_noise(noise, self.depth))):
            x = block(x, mask, n_keys, n_out if i == self.depth - 1 else None, draws)
        return self.norm(x)

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
        nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))     # a view: the weight itself is filled


vit_micro = functools.partial(ViT, image_size=48, patch_size=8, width=96, depth=4, heads=3, pos="sincos")  # two cores
vit_tiny = functools.partial(ViT, width=192, depth=12, heads=3)
vit_small = functools.partial(ViT, width=384, depth=12, heads=6)
vit_base = functools.partial(ViT, width=768, depth=12, heads=12)
vit_large = functools.partial(ViT, width=1024, depth=24, heads=16)
MODELS = {"vit_micro": vit_micro, "vit_tiny": vit_tiny, "vit_small": vit_small, "vit_base": vit_base,
          "vit_large": vit_large}


# ==========================================================================================================
# Machinery. The method ends here: what follows reads weights, describes patches, writes files and draws.
# ==========================================================================================================

# --- memory -----------------------------------------------------------------------------------------------

class GELULinear(torch.autograd.Function):
    """linear(gelu(x)) that keeps x alone for its backward pass, which makes gelu(x) anew: the same numbers.

    Autograd keeps both: gelu needs x, the linear layer gelu(x), and in a ViT's MLP nothing else is as large.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = torch.ops.aten.gelu_backward(grad @ weight.to(grad.dtype), x)     # autocast: float32 weights
        return grad_x, rows.T @ F.gelu(x).flatten(0, -2), rows.sum(0)


def gelu_linear(x, weight, bias):
    if not weight.requires_grad:                                       # then gelu(x) is not kept, either
        return F.linear(F.gelu(x), weight, bias)
    return GELULinear.apply(x, weight, bias)


# --- weights from files and from the web ------------------------------------------------------------------

# Public weights: where, and the hash that their authors published (DINO's published none).
FACEBOOK = "https://dl.fbaipublicfiles.com/"
PUBLIC = {
    "dino_vits16": dict(url=FACEBOOK + "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "dino_vitb16": dict(url=FACEBOOK + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "deit_small": dict(url=FACEBOOK + "deit/deit_small_patch16_224-cd65a155.pth", sha256="cd65a155"),
    "mae_vitb16": dict(url=FACEBOOK + "mae/pretrain/mae_pretrain_vit_base.pth", md5="8cad7c"),      # CC-BY-NC
    "mae_vitl16": dict(url=FACEBOOK + "mae/pretrain/mae_pretrain_vit_large.pth", md5="b8b06e"),     # CC-BY-NC
    "vqkd": dict(url="https://github.com/addf400/files/releases/download/BEiT-v2/"  # BEiT v2's tokenizer, MIT
                     "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth", sha256="d5036aa7"),
}
CLIP_SHA256 = "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"
CLIP_URL = f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/RN50x64.pt"


def download(url, sha256="", md5=""):
    """The path of `url` in torch.hub's cache, fetched once; its hash must begin with what is given."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        if not os.path.exists(path):
            torch.hub.download_url_to_file(url, path, progress=False)        # atomic: several ranks may fetch
    except OSError as error:
        raise ValueError(f"cannot fetch {url} ({error}): put the file at {path} yourself") from None
    for kind, wanted in (("sha256", sha256), ("md5", md5)):
        if wanted and not hashlib.new(kind, Path(path).read_bytes()).hexdigest().startswith(wanted):
            raise ValueError(f"the {kind} of {path} does not begin with {wanted}: remove it to fetch it anew")
    return path


def read_checkpoint(path):
    """torch.load(weights_only=True) on the CPU; ValueError, one line, for what is no readable checkpoint."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):        # DINO's full checkpoints hold one
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                      # a damaged file raises whatever its bytes happen to say
        kind = type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({kind}); was it cut short?") from None


def read_vit_weights(name_or_path):
    """(state dict of the ViT alone under timm's names, path): of a public name, a file or a run folder.

    Files of timm, DINO, DeiT, MAE and of this repository; heads, decoders and mask tokens are left out. A network
    fine-tuned on the mean of its patches (probe.py, MAE) has a new norm, fc_norm, in place of the encoder's.
    """
    if name_or_path in PUBLIC:
        name_or_path = download(**PUBLIC[name_or_path])
    path = os.path.join(name_or_path, "encoder.pt") if os.path.isdir(name_or_path) else name_or_path
    return select_vit(read_checkpoint(path), path), path


def select_vit(state, path):
    """The ViT's part of what a checkpoint holds, under timm's names."""
    for container in ("model", "state_dict", "teacher", "student"):           # MAE and DeiT, timm, DINO
        if isinstance(state, dict) and isinstance(state.get(container), dict):
            state = state[container]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: no ViT weights in it")
    for prefix in ("module.", "backbone.", "encoder."):                       # DDP, DINO, the objectives here
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith((prefix, "fc_norm."))}
    state = {re.sub("^fc_norm", "norm", key): v for key, v in state.items()}
    for key in [key for key in state if key.endswith("attn.q_bias")]:         # BEiT's: keys have no bias
        q, v = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    ours = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
    return {key: v for key, v in state.items() if key.split(".")[0] in ours}


def resize_positions(pos, grid, prefix=1):
    """Positions (1, prefix + n, d) -> (1, prefix + grid*grid, d): bicubic, the class token's are kept."""
    first, patches = pos[:, :prefix], pos[:, prefix:]
    side = math.isqrt(patches.shape[1])
    patches = rearrange(patches.float(), "1 (y x) d -> 1 d y x", y=side)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=grid < side)
    return torch.cat([first, rearrange(patches, "1 d y x -> 1 (y x) d").to(pos.dtype)], 1)


def load_weights(vit, name_or_path):
    """Load a public name, a file or a run folder into `vit`, positions resized to its grid; returns it.

    ValueError, naming the file and the first keys that differ, if it does not fit; `vit` is then untouched.
    """
    return fit_weights(vit, *read_vit_weights(name_or_path))


def fit_weights(vit, state, path):
    """`load_weights` of a state dict that came from `path`."""
    own = vit.state_dict()
    if "pos_embed" in state and state["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
        n = state["pos_embed"].shape[1] - vit.prefix
        if math.isqrt(n) ** 2 == n:
            state["pos_embed"] = resize_positions(state["pos_embed"], vit.grid, vit.prefix)
    differ = [f"{key} missing" for key in own if key not in state]
    differ += [f"{key} unknown" for key in state if key not in own]
    differ += [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in own
               if key in state and state[key].shape != own[key].shape]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ValueError(f"{path} does not fit this ViT: {', '.join(differ[:3])}{more}")
    vit.load_state_dict(state)
    return vit


def from_weights(name_or_path, image_size=None):
    """The ViT, with its weights, of a file, public name or run folder; the shapes tell its sizes."""
    return rebuild_vit(*read_vit_weights(name_or_path), image_size)


def rebuild_vit(state, path, image_size=None):
    """`from_weights` of a state dict that came from `path`."""
    try:
        width, _, p, _ = state["patch_embed.proj.weight"].shape
        cls_token = "cls_token" in state
        grid = math.isqrt(state["pos_embed"].shape[1] - cls_token)
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        mlp_ratio = len(state["blocks.0.mlp.fc1.bias"]) / width
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: no ViT weights in it (missing {error})") from None
    heads = {96: 3, 1280: 16}.get(width, max(1, width // 64))             # vit_micro, ViT-H; else 64 wide
    layer_scale = 1. if "blocks.0.ls1.gamma" in state else None
    vit = ViT(image_size or grid * p, p, width, depth, heads, mlp_ratio, layer_scale, cls_token=cls_token)
    return fit_weights(vit, state, path)


# --- random numbers of an image ---------------------------------------------------------------------------

def hash_uniform(seeds, count):
    """(b, count) float32 in (0, 1) from seeds (2, b) in [0, 1): a counter, hashed with both (lowbias32).

    An image's numbers depend on its seeds alone: no generator, and the same however a batch is divided.
    """
    first, second = (seeds * 2 ** 24).long()[..., None]        # torch.rand's own steps
    x = first + torch.arange(count, device=seeds.device)
    for seed in (0, second):
        x = (x ^ seed) & 0xffffffff
        for shift, factor in ((16, 0x7feb352d), (15, 0x846ca68b)):
            x = ((x ^ (x >> shift)) * factor) & 0xffffffff
        x = x ^ (x >> 16)
    return ((x >> 9) + .5) / 2 ** 23                           # 23 bits: exact in float32, never 0 or 1


# --- frozen features of patches: what K-means clusters, what MaskFeat predicts ----------------------------

IMAGENET = (.485, .456, .406), (.229, .224, .225)  # mean, std on the scale 0..1, of DINO, DeiT and MAE
CLIP = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
SYMMETRIC = (.5, .5, .5), (.5, .5, .5)             # pixels in -1..1, for VQ-KD
ENCODERS = {"dino": "dino_vits16", "deit": "deit_small", "mae": "mae_vitb16"}


@functools.lru_cache
def to_channels(values, device):
    """Three numbers as (3, 1, 1) on the device: copied there once, as a copy makes the CPU wait for a GPU."""
    with torch.inference_mode(False):                                   # wherever the first call comes from
        return torch.tensor(values, device=device).view(3, 1, 1)


def to_device(x, device):
    """x on the device; to a GPU through pinned memory, so that the CPU does not wait for the copy."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def normalize(images, source):
    """uint8 (b, 3, S, S) on any device -> float32, by .mean and .std of `source`: a data set, a tokenizer."""
    mean, std = (to_channels(values, images.device) for values in (source.mean, source.std))
    return (images.float() / 255 - mean) / std


def standardize_patches(images, p):
    """`patchify`, each patch by its own mean and (unbiased) variance: MAE's normalized target, eps 1e-6."""
    x = patchify(images, p)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()


def hog(images, p):
    """Histograms of oriented gradients as in MaskFeat's code: (b, 3, S, S) normalized -> (b, n, 27 m^2).

    9 hard bins of unsigned orientation over m x m cells in a patch, 8 pixels a side (or the largest divisor of
    p below it); the 9 bins of each cell and channel have unit length. Order: channel, bin, cell row and column.
    """
    cell = next(side for side in range(8, 0, -1) if p % side == 0)
    images = F.pad(images, (1, 1, 1, 1), mode="reflect")
    smooth = lambda x, dim: sum(part * w for part, w in zip(x.unfold(dim, 3, 1).unbind(-1), (1, 2, 1)))
    change = lambda x, dim: x.unfold(dim, 3, 1)[..., 0] - x.unfold(dim, 3, 1)[..., 2]
    gx, gy = change(smooth(images, 2), 3), change(smooth(images, 3), 2)   # Sobel; a convolution may be TF32
    bins = (torch.atan2(gx, gy) / math.pi * 9).floor() % 9              # x first: measured from the y axis
    magnitude = torch.linalg.vector_norm(torch.stack([gx, gy]), dim=0)  # its gradient at 0: 0, hypot's: NaN
    add_up = lambda x: reduce(x, "b c (y i) (x j) -> b c y x", "sum", i=cell, j=cell)
    cells = F.normalize(torch.stack([add_up(magnitude * (bins == o)) for o in range(9)], 2), dim=2)
    return rearrange(cells, "b c o (y i) (x j) -> b (y x) (c o i j)", i=p // cell, j=p // cell)


# What describes a patch without any network: function(images normalized, p) -> (b, n, values).
PATCH_FEATURES = {"pixel": patchify, "pixel-norm": standardize_patches, "hog": hog}


def conv_norm(width_in, width, side, stride=1):
    return nn.Conv2d(width_in, width, side, stride, padding=side // 2, bias=False), nn.BatchNorm2d(width)


class Bottleneck(nn.Module):
    """CLIP's ResNet block: where a ResNet has a strided convolution, it averages."""

    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(width_in, width, 1)
        self.conv2, self.bn2 = conv_norm(width, width, 3)
        self.conv3, self.bn3 = conv_norm(width, 4 * width, 1)
        self.shrink = nn.AvgPool2d(stride)
        widen = width_in != 4 * width
        self.downsample = nn.Sequential(*conv_norm(width_in, 4 * width, 1)) if widen else nn.Identity()

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.shrink(y)))
        return F.relu(y + self.downsample(self.shrink(x)))


class CLIPTrunk(nn.Module):
    """CLIP's ResNet to the last ReLU of layer 4, without pooling: (b, 3, S, S) -> (b, 32 width, S/32, S/32).

    The default is RN50x64: 4096 features at 14x14 places of 448 pixels (MaPeT Sec. 4.2: k-CLIP).
    """

    def __init__(self, width=128, layers=(3, 15, 36, 10)):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(3, width // 2, 3, stride=2)
        self.conv2, self.bn2 = conv_norm(width // 2, width // 2, 3)
        self.conv3, self.bn3 = conv_norm(width // 2, width, 3)
        width_in = width
        for i, depth in enumerate(layers):
            blocks = [Bottleneck(width_in, width, stride=2 if i else 1)]
            blocks += [Bottleneck(4 * width, width, stride=1) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            width_in, width = 4 * width, 2 * width

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def load_clip():
    """RN50x64's trunk with OpenAI's weights, those of their TorchScript archive, in float32."""
    archive = torch.jit.load(download(CLIP_URL, sha256=CLIP_SHA256), map_location="cpu")
    trunk = CLIPTrunk()
    trunk.load_state_dict({key: v.float() for key, v in archive.visual.state_dict().items()
                           if not key.startswith("attnpool")})
    return trunk.to(memory_format=torch.channels_last)


def make_projection(width, size):
    """From a ViT's patch tokens to the codes of a learned tokenizer, of VQ-KD's shape (BEiT v2's code)."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, size))


class PatchFeatures(nn.Module):
    """Normalized images (b, 3, S, S) -> (b, n, d) float32, a row a patch, by what is never trained (here).

    name      pixel, pixel-norm (standardized patches), hog, clip, dino, deit, mae, or what from_weights takes
    weights   of a learned tokenizer, whose name is then only a name: {encoder.KEY of a ViT, project.KEY}
    """

    def __init__(self, name, patch_size, image_size, weights=None):
        super().__init__()
        self.name, self.patch_size, self.image_size, self.encoder = name, patch_size, image_size, None
        self.project = nn.Identity()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a multiple of patch size {patch_size}")
        if name == "clip" and patch_size != 16:
            raise ValueError(f"clip has a feature for every 16 pixels: patch size {patch_size} does not fit")
        if name == "clip":
            self.encoder = load_clip()
        elif weights is not None:
            vit, head = ({key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
                         for part in ("encoder.", "project."))
            self.encoder = rebuild_vit(vit, name, image_size)
            self.project = make_projection(self.encoder.width, len(head["2.bias"]))
            self.project.load_state_dict(head)
        elif name not in PATCH_FEATURES:
            self.encoder = from_weights(ENCODERS.get(name, name), image_size)
        if getattr(self.encoder, "patch_size", patch_size) != patch_size:
            raise ValueError(f"{name} has patches of {self.encoder.patch_size} pixels, not {patch_size}")
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)                             # CLIP's batch norm would move with the images

    def forward(self, images):
        if self.encoder is None:
            return PATCH_FEATURES[self.name](images, self.patch_size)
        with torch.autocast("cuda", torch.float16, enabled=images.is_cuda):
            if self.name != "clip":
                x = self.encoder(images)[:, self.encoder.prefix:]
            else:
                if images.shape[-1] == self.image_size:        # CLIP sees twice the pixels: stride 32, not 16
                    images = F.interpolate(images, scale_factor=2, mode="bicubic")
                x = rearrange(self.encoder(images), "b d y x -> b (y x) d")
        return self.project(x.float())

    def layers(self, images):
        """What a perceptual loss compares: [(b, rows, d)], each row standardized; gradients reach the images.

        Of a ViT, after 3, 6, 9 and 11 of 12 blocks (PeCo), or as many of its own; of all else, its features.
        """
        if self.name == "clip":
            raise ValueError("--features clip: a perceptual loss takes hog, pixel-norm or a ViT (dino, mae)")
        rows, vit = [], self.encoder
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda and vit is not None):
            if vit is None:
                rows.append(PATCH_FEATURES[self.name](images, self.patch_size))
            else:
                chosen, x = {max(1, vit.depth * i // 12) for i in (3, 6, 9, 11)}, vit.embed(images)
                for i, block in enumerate(vit.blocks, 1):
                    x = block(x)
                    rows += [x] * (i in chosen)
        return [F.layer_norm(x.float(), x.shape[-1:]) for x in rows]


# --- files: all or nothing, and one line for what went wrong ----------------------------------------------

@contextlib.contextmanager
def write_atomically(path):
    """Yields the name of a temporary file, which becomes `path` when the block ends.

    A kill leaves the old file. So does a full disk: then OSError, one line, and the temporary file is gone.
    """
    temporary = f"{path}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                        # torch.save turns the disk's into its own
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if str(error).startswith("DataLoader worker"):              # told of just now, by a signal
            raise
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"{path} cannot be written ({why}); what was there before is kept") from None


def save(state, path):
    """torch.save, atomically."""
    with write_atomically(path) as temporary:
        torch.save(state, temporary)


@contextlib.contextmanager
def exit_on_error(script):
    """Bad input ends in one line and exit code 2, a lost process in one and 1; a bug keeps its traceback.

    Bad input (ValueError) is the same on every rank, and rank 0 says it; others are said by whom they strike.
    """
    again = "the same command goes on from what was saved"
    try:
        yield
    except (KeyboardInterrupt, ValueError, OSError, RuntimeError, EOFError) as error:
        first, *others = str(error).strip().splitlines() or [type(error).__name__]
        code = 1
        if isinstance(error, KeyboardInterrupt):                    # before the first step; see catch_signals
            code, line = 130, f"interrupted; {again}"
        elif isinstance(error, (ConnectionError, EOFError)) or first.startswith("DataLoader worker"):
            line = (f"a loading process was lost ({first}); short of memory, of /dev/shm? "
                    f"Fewer --workers; {again}")
        elif isinstance(error, (ValueError, OSError)):
            code, line = 2, first
            if isinstance(error, FileExistsError):
                line = f"{error.filename}: a folder is wanted, and a file is there"
            if "worker process" in first:  # a loader's whole traceback: its last line
                line = re.sub(r"^\w+: ", "", others[-1])
        elif isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in first:
            line = f"the device is out of memory; --micro-batch: fewer images at once, the same result; {again}"
        elif "WORLD_SIZE" in os.environ and re.search("gloo|nccl|connection|peer", str(error), re.I):
            line = f"another process of this run was lost; {again}"
        else:
            raise
        traceback.clear_frames(error.__traceback__)              # lets go of the loaders, which end at once
        if not isinstance(error, ValueError) or int(os.environ.get("RANK", 0)) == 0:
            print(f"{script}: error: {line}", file=sys.stderr, flush=True)
        sys.exit(code)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


# --- pictures, and the table of sizes ----------------------------------------------------------------------

def principal_colors(target, *others):
    """Rows (b, n, d) -> [colors (b, n, 3) in 0..1: their three principal components; `others` by the same].

    An axis has no sign of its own: its largest entry is made positive, so that the picture repeats. (Not its
    sum: rows that leave a LayerNorm sum to zero, and so does any axis of theirs.) A constant one is gray.
    """
    rows = target.flatten(0, 1).float()
    mean = rows.mean(0)
    axes = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:3].T             # (d, 3)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    low, high = ((rows - mean) @ axes).quantile(torch.tensor([.02, .98], device=rows.device), dim=0)
    span = high - low
    varies = span > 1e-4 * rows.abs().max()                             # more than rounding
    scaled = [(((x - mean) @ axes - low) / span).clamp(0, 1) for x in (target, *others)]
    return [torch.where(varies, x, .5) for x in scaled]


def save_picture(picture, path):
    """A PIL picture as a PNG, in a folder that is made if need be."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with write_atomically(path) as temporary:
        picture.save(temporary, format="png")


def draw_grid(rows, path, labels=(), times=None):
    """PNG of rows of images (b, 3, S, S) in 0..1, labels to the left; a pixel becomes times x times."""
    side = rows[0].shape[-1]
    times = times or math.ceil(900 / (len(rows[0]) * side))             # to a picture of 900 pixels or more
    images = repeat(torch.cat(list(rows)).float().cpu(), "m c y x -> m c (y i) (x j)", i=times, j=times)
    grid = make_grid(images, nrow=len(rows[0]), padding=4, pad_value=1.)
    picture = to_pil_image(grid.mul(255).add(.5).clamp(0, 255).to(torch.uint8))
    margin = 10 * max(map(len, labels), default=0)
    picture = ImageOps.expand(picture, (margin, 0, 0, 0), "white")
    for i, label in enumerate(labels):
        middle = 4 + i * (side * times + 4) + side * times / 2
        ImageDraw.Draw(picture).text((margin - 6, middle), label, fill="black", anchor="rm", font_size=17)
    save_picture(picture, path)


COLORS = ("#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000 #999999 "  # Okabe and Ito: for all eyes
          "#7b3f00 #6a3d9a #8fbc5a #b00000").split()


def find_range(values):
    """(low, high) of an axis: the range of the values, and a little more."""
    values = [value for value in values if math.isfinite(value)] or [0]
    low, high = min(values), max(values)
    margin = .04 * (high - low) or .5 * abs(high) or 1
    return low - margin, high + margin


def choose_ticks(low, high, count=5):
    """About `count` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = min((times * power for times in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_dashes(draw, start, end, y, color):
    for x in range(round(start), round(end), 40):
        draw.line([(x, y), (min(x + 24, end), y)], color, 6)


def draw_plot(x, y, curves={}, dots={}, levels={}):
    """A plot as a picture, 1800 pixels wide: `save_plots` halves it, which makes its lines smooth.

    x, y          what the axes show
    curves, dots  {label: [(xs, ys), ...]}: a color for each label; several of one label (seeds) are thin
    levels        {label: y}: dashed lines across
    """
    pairs = [pair for several in [*curves.values(), *dots.values()] for pair in several]
    x0, x1 = find_range(value for xs, _ in pairs for value in xs)
    y0, y1 = find_range([value for _, ys in pairs for value in ys] + [*levels.values()])
    labels = [*dict.fromkeys([*curves, *dots]), *levels]
    color = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    font = ImageFont.load_default(52)                          # 26 pixels in the end: legible on a phone

    # The legend, above: behind the name of the y axis, in as many rows as it takes.
    entries, start, row = [], 60 + font.getlength(y), 0
    for label in labels:
        length = 140 + font.getlength(label)
        if start + length > 1800 and start > 20:
            start, row = 20, row + 1
        entries.append((label, start, 50 + 80 * row))
        start += length
    left, right, top = 220, 1760, 120 + 80 * row
    bottom = top + 840
    place = lambda a, b: (left + (a - x0) / (x1 - x0) * (right - left), top + (y1 - b) / (y1 - y0) * (bottom - top))
    picture = Image.new("RGB", (1800, bottom + 180), "white")
    draw = ImageDraw.Draw(picture)
    write = lambda a, b, text, anchor: draw.text((a, b), text, "black", font, anchor)

    write(20, 50, y, "lm")
    write((left + right) / 2, bottom + 150, x, "mb")
    for tick in choose_ticks(x0, x1):
        write(place(tick, y0)[0], bottom + 16, f"{tick:.6g}", "mt")
    for tick in choose_ticks(y0, y1):
        draw.line([place(x0, tick), place(x1, tick)], "lightgray", 2)
        write(left - 20, place(x0, tick)[1], f"{tick:.6g}", "rm")
    draw.rectangle([left, top, right, bottom], outline="gray", width=2)

    for label, level in levels.items():
        draw_dashes(draw, left, right, place(x0, level)[1], color[label])
    for label, several in curves.items():
        for pair in several:
            points = [place(a, b) for a, b in zip(*pair) if math.isfinite(b)]
            if points:
                draw.line(points, color[label], 8 if len(several) == 1 else 4, joint="curve")
    for label, several in dots.items():
        for a, b in [point for pair in several for point in zip(*pair)]:
            draw.circle(place(a, b), 14, color[label])
    for label, a, b in entries:
        write(a + 100, b, label, "lm")
        if label in curves:
            draw.line([(a, b), (a + 80, b)], color[label], 8)
        if label in dots:
            draw.circle((a + 40, b), 14, color[label])
        if label in levels:
            draw_dashes(draw, a, a + 80, b, color[label])
    return picture


def save_plots(plots, path):
    """PNG of plots, one below the other, 900 pixels wide."""
    tops = [sum(plot.height for plot in plots[:i]) for i in range(len(plots) + 1)]
    joined = Image.new("RGB", (1800, tops[-1]))
    for plot, top in zip(plots, tops):
        joined.paste(plot, (0, top))
    save_picture(joined.reduce(2).quantize(64), path)


def count_flops(function, *inputs):
    """Floating-point operations of one call (a multiply-add counts as two); meta tensors cost nothing."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)
    return counter.get_total_flops()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Parameters and FLOPs per image of every named ViT.")
    parser.add_argument("--image-size", type=int, help="pixels a side (default: 224; vit_micro 48)")
    parser.add_argument("--patch-size", type=int, help="pixels a side (default: 16; vit_micro 8)")
    over = {key: value for key, value in vars(parser.parse_args(argv)).items() if value}
    print(f"{'model':<10} image patch patches width depth {'params':>9} {'GFLOPs/image':>12}")
    for name, build in MODELS.items():
        with exit_on_error("vit.py"), torch.device("meta"):
            vit = build(**over)
            flops = count_flops(vit, torch.empty(1, 3, vit.image_size, vit.image_size))
        params = sum(p.numel() for p in vit.parameters())
        print(f"{name:<10} {vit.image_size:>5} {vit.patch_size:>5} {vit.n_patches:>7} {vit.width:>5} {vit.depth:>5} "
              f"{params / 1e6:>8.2f}M {flops / 1e9:>12.2f}")


if __name__ == "__main__":
    main()
