"""The U-Net of Stage B in both releases: levels of blocks from fine to coarse and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..kernels.mlp import MappedLatents
from .attention import AttnBlock
from .feature_reuse import DeepFeatures
from .init import init_blocks, xavier_init
from .layers import ChannelNorm, EarlySkipResBlock, FeedForwardBlock, ResBlock, TimestepBlock, channels_last
from .operations import from_namespace


class UNetParams:
    """Base of both releases' sizes. Tuples have one entry per level, from fine to coarse.

    A level repeats its pattern of blocks `level_config` as often as `blocks` says: C(onvolution), T(ime), A(ttention),
    F(eed-forward). `c_r` is the width of the time embedding.
    """

    patch_size: int
    c_hidden: tuple[int, ...]

    @property
    def multiple(self) -> int:
        """The number that divides both sides of every input."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


Inject = Callable[[int, Tensor], MappedLatents | None]  # from a level and its features [B, c, H, W]


class Block(NamedTuple):
    """One repeat of a level's pattern, or the change to a coarser level: layers `start` to `stop` of a level.

    Blocks are numbered as in other U-Nets: input 0 is the embedding, and the last one before the way up is middle 0.
    """

    kind: str  # input, middle or output
    number: int
    level: int = 0  # down and up again: the coarsest level counts twice
    start: int = 0
    stop: int = 0
    takes_skip: bool = False
    saves_skip: bool = False


EMBEDDING = Block("input", 0)


class UNet(nn.Module):
    """The layers that both releases have; subclasses embed the input and the conditioning."""

    params: Any
    blocks: list[Block]

    def build(
        self, c_in: int, c_out: int, c_injected: tuple[int, ...], *, v1: bool, operations: Any, **factory: Any
    ) -> None:
        """Adds the layers from c_in to c_out channels; `c_injected` channels join every convolution of a level.

        `v1`: skip connections join before the convolution, and attention has the original's parameter names.
        """
        p, last = self.params, len(self.params.c_hidden) - 1
        ops = {"operations": operations, **factory}
        convolution, attention = EarlySkipResBlock if v1 else ResBlock, from_namespace(operations, AttnBlock)

        def blocks(level: int, c_skip: int) -> nn.ModuleList:
            """Returns the blocks of one level; the first convolution also takes the skip connection's channels."""
            c, out = p.c_hidden[level], nn.ModuleList()
            for repeat in range(p.blocks[level]):
                for position, kind in enumerate(p.level_config[level]):
                    if kind == "C":
                        extra = c_injected[level] + (c_skip if repeat == position == 0 else 0)
                        out.append(convolution(c, extra, p.kernel_size, p.dropout, **ops))
                    elif kind == "T":
                        out.append(TimestepBlock(c, p.c_r, **ops))
                    elif kind == "A":
                        out.append(attention(c, p.c_cond, p.nhead[level], p.self_attn, p.dropout, v1, **ops))
                    elif kind == "F":
                        out.append(FeedForwardBlock(c, p.dropout, **ops))
                    else:
                        raise ValueError(f"level_config has an unknown block kind {kind!r}: use C, T, A or F")
            return out

        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(p.patch_size),
            operations.Conv2d(c_in * p.patch_size**2, p.c_hidden[0], kernel_size=1, **factory),
            ChannelNorm(),
        )
        self.down_blocks = nn.ModuleList()
        for i in range(last + 1):
            level = nn.ModuleList()
            if i > 0:
                down = operations.Conv2d(p.c_hidden[i - 1], p.c_hidden[i], kernel_size=2, stride=2, **factory)
                level.append(nn.Sequential(ChannelNorm(), down))
            self.down_blocks.append(level.extend(blocks(i, c_skip=0)))
        self.up_blocks = nn.ModuleList()
        for i in range(last, -1, -1):
            level = blocks(i, c_skip=p.c_hidden[i] if i < last else 0)
            if i > 0:
                up = operations.ConvTranspose2d(p.c_hidden[i], p.c_hidden[i - 1], kernel_size=2, stride=2, **factory)
                level.append(nn.Sequential(ChannelNorm(), up))
            self.up_blocks.append(level)
        self.clf = nn.Sequential(
            ChannelNorm(),
            operations.Conv2d(p.c_hidden[0], c_out * p.patch_size**2, kernel_size=1, **factory),
            nn.PixelShuffle(p.patch_size),
        )
        self.blocks = self._list_blocks()

    def _list_blocks(self) -> list[Block]:
        p, depth, out = self.params, len(self.down_blocks), []
        numbers = {"input": 1, "middle": 0, "output": 0}
        for level, layers in enumerate((*self.down_blocks, *self.up_blocks)):
            resolution = min(level, 2 * depth - 1 - level)
            first = 1 if 0 < level < depth else 0  # the layer that changes to a coarser level is a block of its own
            repeats = range(p.blocks[resolution])
            starts = [0][:first] + [first + repeat * len(p.level_config[resolution]) for repeat in repeats] or [0]
            for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True):
                last = stop == len(layers)
                kind = "output" if level >= depth else "middle" if last and level == depth - 1 else "input"
                takes_skip, saves_skip = level > depth and not start, last and level < depth - 1
                out.append(Block(kind, numbers[kind], level, start, stop, takes_skip, saves_skip))
                numbers[kind] += 1
        return out

    def init_unet(self, mappers: Iterable[Any]) -> None:
        """Initialises the weights as the original does before training; `mappers` map the conditioning."""
        self.apply(xavier_init)
        for layer in mappers:
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].get_parameter("weight"), 0.02)
        nn.init.zeros_(self.clf[1].get_parameter("weight"))
        for level in (*self.down_blocks, *self.up_blocks):
            init_blocks(level, depth=sum(self.params.blocks))

    def check_size(self, x: Tensor) -> None:
        """Raises ValueError if a side of x [B, ..., H, W] is not a multiple of `params.multiple`."""
        multiple, (height, width) = self.params.multiple, x.shape[-2:]
        if height % multiple or width % multiple:
            raise ValueError(
                f"Stage B's input is {width}x{height}: choose multiples of {multiple} ({multiple * 4} pixels)"
            )

    def join(self, block: Block, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a block's input and the skip connection's channels that join its first convolution."""
        return x, skip

    def finish(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next block's input and the skip connection that a level's last block saves."""
        return x, x

    def run(
        self,
        x: Tensor,
        time: Tensor,
        cond: Tensor,
        inject: Inject | None = None,
        mask: Tensor | None = None,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """Maps x [B, c_in, H, W] to [B, c_out, H, W], given time embeddings [B, c_r] and conditioning [B, M, c_cond].

        `inject` returns what joins all convolutions of a level, numbered down and up again. `mask` [B, M] is False
        where the conditioning is padding. `deep` replaces all levels below the finest, if it has features; otherwise
        this stores them in it.
        """
        x = self.embedding[0](x)
        x = self.embedding[2](self.embedding[1](channels_last(x)))  # [B, c_hidden[0], H / patch_size, W / patch_size]
        x, _ = self.finish(EMBEDDING, x)
        levels = (*self.down_blocks, *self.up_blocks)
        skips: list[Tensor] = []
        reused = None if deep is None else deep.features
        for block in self.blocks:
            if reused is not None and 0 < block.level < len(levels) - 1:
                x = reused
                continue
            skip = None
            if block.takes_skip:
                x, skip = self.join(block, x, skips.pop())
            for i in range(block.start, block.stop):
                layer = levels[block.level][i]
                if isinstance(layer, ResBlock):
                    x, skip = layer(x, skip, inject and inject(block.level, x)), None
                elif isinstance(layer, AttnBlock):
                    x = layer(x, cond, *(() if mask is None else (mask,)))
                elif isinstance(layer, TimestepBlock):
                    x = layer(x, time)
                else:  # feed-forward, or the change of resolution between two levels
                    x = layer(x)
            x, saved = self.finish(block, x)
            if block.saves_skip:
                skips.append(saved)
            if deep is not None and block.level == len(levels) - 2:
                deep.features = x
        return self.clf(x)
