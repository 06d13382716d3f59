"""Each method against its formula, the blocks computed plainly from the raw weights in float64; plain against the towers' own."""

import math

import pytest
import torch
from timm.layers import AttentionPoolLatent
from torch.nn import functional as F

from cutline import towers
from cutline.errors import ConfigError, CutlineError
from cutline.towers.config import TowerConfig
from cutline.zeroshot.dense import DenseTower, neighbours

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "layers": 1, "heads": 1}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "linear", "image_size": 32}
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16, "ls_init_value": 0.3}
KINDS = {
    "native": VISION,
    "two-classes": {k: v for k, v in VISION.items() if k != "ls_init_value"},
    "average": {**VISION, "pool_type": "avg", "final_ln_after_pool": True},
    "coca": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "siglip": {**TIMM, "timm_pool": "token"},  # given SigLIP's pooling below
    "timm-average": {**TIMM, "timm_pool": "avg"},
}  # fmt: skip
SHAPES = [(3, 32, 32), (3, 48, 80)]  # the tower's own; not square, and of 16 px in every kind


def make(kind, seed=0):
    """A model of a kind whose every weight is random, in float64."""
    torch.manual_seed(seed)
    timm = "timm_model_name" in KINDS[kind]
    custom = {"embed_dim": 24, "vision_cfg": dict(KINDS[kind]), "text_cfg": TEXT, "custom_text": timm}
    model = towers.build(TowerConfig(custom=custom, class_tokens=2 if kind == "two-classes" else 1)).eval()
    if kind == "siglip":
        model.visual.trunk.attn_pool = AttentionPoolLatent(192, num_heads=3, norm_layer=torch.nn.LayerNorm)
    if timm:
        model.visual.trunk.blocks = model.visual.trunk.blocks[:3]
    model.double()
    with torch.no_grad():
        for p in model.visual.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return towers.load_encoder(model)


@pytest.fixture(scope="module")
def encoders():
    return {kind: make(kind) for kind in KINDS}


def pictures(shape):
    return torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Plain:
    """The parts of a tower, computed plainly from its weights."""

    def __init__(self, encoder):
        self.visual, self.native = encoder.visual, not hasattr(encoder.visual, "trunk")
        self.encoder = encoder
        trunk = self.visual if self.native else self.visual.trunk
        self.blocks = list(trunk.transformer.resblocks if self.native else trunk.blocks)
        self.prefix = encoder.prefix if self.native else 1

    def embed(self, x):
        if self.native:
            return self.encoder.embed(x, dropout=False)[0]
        trunk = self.visual.trunk
        return trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(x)))

    def qkv(self, block, x):
        """Lists over heads of (B, T, d)."""
        norm, heads = (block.ln_1, block.attn.num_heads) if self.native else (block.norm1, block.attn.num_heads)
        weight = block.attn.in_proj_weight if self.native else block.attn.qkv.weight
        bias = block.attn.in_proj_bias if self.native else block.attn.qkv.bias
        y = norm(x) @ weight.T + bias
        return [part.chunk(heads, -1) for part in y.chunk(3, -1)]

    def out(self, block, heads):
        y = torch.cat(list(heads), -1)
        if self.native:
            return (y @ block.attn.out_proj.weight.T + block.attn.out_proj.bias) * getattr(block.ls_1, "gamma", 1)
        return y @ block.attn.proj.weight.T + block.attn.proj.bias

    def mlp(self, block, x):
        return block.ls_2(block.mlp(block.ln_2(x))) if self.native else block.mlp(block.norm2(x))

    def cells(self, x):
        """Each cell as the only one that is pooled."""
        if self.native:
            v, pool = self.visual, self.visual.attn_pool
            if pool is not None:
                value = pool.ln_k(x) @ pool.attn.v_proj_weight.T + pool.attn.in_proj_bias.chunk(3)[2]
                x = value @ pool.attn.out_proj.weight.T + pool.attn.out_proj.bias
            return v.ln_post(x) @ v.proj
        trunk = self.visual.trunk
        x = trunk.norm(x)
        if trunk.attn_pool is not None:
            pool = trunk.attn_pool
            x = x @ pool.kv.weight.chunk(2)[1].T + pool.kv.bias.chunk(2)[1]
            x = x @ pool.proj.weight.T + pool.proj.bias
            x = x + pool.mlp(pool.norm(x))
        return trunk.fc_norm(x) @ self.visual.head.proj.weight.T


def softmax(a, b, extra=0.0):
    return (a @ b.transpose(1, 2) / math.sqrt(a.shape[-1]) + extra).softmax(-1)


def expected(encoder, x, method):
    """(B, N, D) of the module's table."""
    plain = Plain(encoder)
    tokens, p = plain.embed(x), plain.prefix
    if method == "surgery":
        first = len(plain.blocks) // 2
        for block in plain.blocks[:first]:
            tokens = block(tokens)
        path = tokens
        for block in plain.blocks[first:]:
            _, _, v = plain.qkv(block, tokens)
            path = path + plain.out(block, [softmax(h, h) @ h for h in v])
            tokens = block(tokens)
        return plain.cells(path[:, p:])
    for block in plain.blocks[:-1]:
        tokens = block(tokens)
    block = plain.blocks[-1]
    q, k, v = plain.qkv(block, tokens)
    if method == "naclip":
        side = [n // encoder.multiple for n in x.shape[-2:]]
        places = [(i, j) for i in range(side[0]) for j in range(side[1])]
        bias = torch.zeros(p + len(places), p + len(places), dtype=x.dtype)
        for a, (i, j) in enumerate(places):
            for b, (m, n) in enumerate(places):
                bias[p + a, p + b] = math.exp(-((i - m) ** 2 + (j - n) ** 2) / 50)
    attended = {
        "plain": lambda h: softmax(q[h], k[h]) @ v[h],
        "maskclip": lambda h: v[h],
        "sclip": lambda h: (softmax(q[h], q[h]) + softmax(k[h], k[h])) @ v[h],
        "clearclip": lambda h: softmax(q[h], q[h]) @ v[h],
        "naclip": lambda h: softmax(k[h], k[h], bias) @ v[h],
    }[method]
    y = plain.out(block, [attended(h) for h in range(len(v))])
    if method in ("plain", "maskclip", "sclip"):
        y = y + tokens
        y = y + plain.mlp(block, y)
    return plain.cells(y[:, p:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["plain", "maskclip", "sclip", "surgery", "naclip", "clearclip"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_method_equals_its_formula(encoders, kind, method, shape):
    encoder, x = encoders[kind], pictures(shape)
    got = DenseTower(encoder, method)(x)
    assert got.shape == (3, 24, shape[1] // encoder.multiple, shape[2] // encoder.multiple)
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), expected(encoder, x, method), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_proxyclip_equals_its_formula_on_the_grid_of_the_second_encoder(encoders, shape):
    encoder, proxy, x = encoders["timm-average"], make("native", seed=5), pictures(shape)  # 16 and 8 px a cell
    plain, tokens = Plain(encoder), Plain(encoder).embed(x)
    for block in plain.blocks[:-1]:
        tokens = block(tokens)
    _, _, v = plain.qkv(plain.blocks[-1], tokens)
    grid, own = [n // 16 for n in shape[1:]], [n // 8 for n in shape[1:]]
    mean, std = (torch.tensor(c, dtype=x.dtype).view(3, 1, 1) for c in (encoder.mean, encoder.std))
    own_mean, own_std = (torch.tensor(c, dtype=x.dtype).view(3, 1, 1) for c in (proxy.mean, proxy.std))
    seen = F.normalize(proxy.last((x * std + mean - own_mean) / own_std).flatten(2), dim=1)
    heads = [torch.empty(3, own[0] * own[1], v[0].shape[-1], dtype=x.dtype) for _ in v]
    for i in range(3):
        s = seen[i].T @ seen[i]
        s = (s - 1.2 * s.mean()) * 3
        s[(s < 0) & ~torch.eye(len(s), dtype=torch.bool)] = -math.inf
        for h, value in enumerate(v):
            cells = value[i, 1:].T.reshape(1, -1, *grid)
            heads[h][i] = s.softmax(-1) @ F.interpolate(cells, own, mode="bilinear").flatten(2)[0].T
    got = DenseTower(encoder, "proxyclip", proxy)(x)
    assert got.shape[2:] == tuple(own)
    want = plain.cells(plain.out(plain.blocks[-1], heads))
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_second_encoder_to_which_all_is_alike_leaves_every_cell_to_itself(encoders):
    encoder, proxy = encoders["native"], make("native", seed=3)
    proxy.last = lambda x: torch.ones(len(x), 4, x.shape[-2] // 8, x.shape[-1] // 8, dtype=x.dtype)
    x = pictures((2, 32, 32))
    block, view = encoder.visual.transformer.resblocks[-1], DenseTower(encoder, "maskclip").view
    tokens = view.embed(x)
    for b in encoder.visual.transformer.resblocks[:-1]:
        tokens = b(tokens)
    alone = view.cells(view.out(block, view.project(block, view.norm(block, tokens), "v"))[:, 1:])
    got = DenseTower(encoder, "proxyclip", proxy)(x)
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), alone)


@torch.no_grad()
def test_plain_equals_open_clips_own_tokens_to_the_projection(encoders):
    visual, x = encoders["two-classes"].visual, pictures((2, 32, 32))
    visual.output_tokens = True
    _, tokens = visual(x)
    visual.output_tokens = False
    got = DenseTower(encoders["two-classes"], "plain")(x)
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), tokens @ visual.proj)


@torch.no_grad()
def test_cells_of_an_average_pooling_tower_average_to_its_embedding(encoders):
    encoder, x = encoders["native"], pictures((2, 32, 32))
    encoder.visual.pool_type = "avg"
    got = DenseTower(encoder, "plain")(x).mean((2, 3))
    torch.testing.assert_close(got, encoder.pooled(x))
    encoder.visual.pool_type = "tok"


@pytest.mark.parametrize("method", ["sclip", "naclip", "surgery", "proxyclip"])
@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch_nor_on_a_size_of_no_whole_patches(encoders, method):
    proxy = make("native", seed=4) if method == "proxyclip" else None
    tower, x = DenseTower(encoders["native"], method, proxy), pictures((3, 37, 21))
    got = tower(x)
    assert got.shape[2:] == (5, 3)
    torch.testing.assert_close(got[1:2], tower(x[1:2]), atol=1e-6, rtol=1e-6)
    assert tower(pictures((1, 3, 5))).shape == (1, 24, 1, 1)  # smaller than a patch


def test_neighbours_weigh_by_distance():
    bias = neighbours((2, 3), 5.0, torch.zeros(1))
    assert bias.diag().tolist() == [1.0] * 6
    assert bias[0, 5].item() == pytest.approx(math.exp(-5 / 50))


@torch.no_grad()
def test_towers_with_stages_have_the_plain_way_alone():
    encoder = towers.load_encoder("scratch:convnext_atto")
    with pytest.raises(CutlineError, match=r"convnext_atto is no plain ViT.*method=sclip.*Use method=plain"):
        DenseTower(encoder, "sclip")
    assert DenseTower(encoder, "plain")(torch.zeros(1, 3, 64, 96)).shape[2:] == (2, 3)


def test_a_proxy_belongs_to_proxyclip(encoders):
    with pytest.raises(ConfigError, match="give both, or neither"):
        DenseTower(encoders["native"], "proxyclip")
