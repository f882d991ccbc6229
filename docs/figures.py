"""Draws the figures of the documentation as SVG: `python docs/figures.py` rewrites docs/figures.

Plain Python, no dependency, the same bytes on every run: a test compares them with what is
committed. Each figure has its own light background, so it is legible on a dark page too.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "figures"
INK, GRAY, LINE = "#1f2937", "#6b7280", "#9ca3af"
BLUE, GREEN, ORANGE, PURPLE, PALE, WHITE = (
    "#dbeafe",
    "#dcfce7",
    "#ffedd5",
    "#ede9fe",
    "#f3f4f6",
    "#ffffff",
)


class Figure:
    """An SVG of `width` x `height` units, built from boxes, arrows and text."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def rect(self, x, y, w, h, fill=PALE, radius=0, stroke=LINE) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )

    def text(self, x, y, line, size=13, anchor="middle", color=INK, bold=False, mono=False):
        family = "monospace" if mono else "sans-serif"
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-family="{family}" font-size="{size}" '
            f'text-anchor="{anchor}" fill="{color}"{weight}>{escape(line, quote=False)}</text>'
        )

    def box(self, x, y, w, h, lines, fill=BLUE, mono=False) -> None:
        """A rounded box; the first line is bold, the others are small."""
        self.rect(x, y, w, h, fill, 6)
        top = y + h / 2 - 8 * (len(lines) - 1) + 5
        for i, line in enumerate(lines):
            size, color = (13, INK) if i == 0 else (11, GRAY)
            at = round(top + 17 * i, 1)
            self.text(x + w / 2, at, line, size, color=color, bold=i == 0, mono=mono and i == 0)

    def arrow(self, *points, label="", dx=6, dy=-4, anchor="start") -> None:
        """A line through (x, y) points with a head at the last; the label is at its middle."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{GRAY}" stroke-width="1.5" '
            'marker-end="url(#head)"/>'
        )
        if label:
            (x1, y1), (x2, y2) = points[-2], points[-1]
            self.text((x1 + x2) / 2 + dx, (y1 + y2) / 2 + dy, label, 11, anchor, GRAY)

    def svg(self) -> str:
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{GRAY}"/>'
            "</marker></defs>"
        )
        back = (
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" '
            f'fill="{WHITE}" stroke="#d1d5db"/>'
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">',
            f"<title>{escape(self.title, quote=False)}</title>",
            head,
            back,
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def call_path() -> Figure:
    f = Figure(780, 430, "From the public function of an op to its kernel")
    steps = [
        (["deepkern.fp8_gemm_nt(a, a_scale, ...)", "public function, with autograd"], BLUE),
        (["torch.ops.deepkern.fp8_gemm_nt", "the torch op: schema and fake kernel"], BLUE),
        (
            ["backend choice", "device, dtype, shape; DEEPKERN_BACKEND or deepkern.backend()"],
            ORANGE,
        ),
    ]
    for i, (lines, fill) in enumerate(steps):
        f.box(190, 20 + 70 * i, 400, 46, lines, fill, mono=i < 2)
        if i:
            f.arrow((390, 66 + 70 * (i - 1)), (390, 20 + 70 * i))
    backends = [
        ("cuda", "csrc/sm90", "C++ for Hopper", "CUDA kernel"),
        ("triton", "matmul/fp8_gemm_nt.py", "NVIDIA and AMD GPUs", "Triton kernel"),
        ("cpu", "csrc/cpu", "AVX2, AVX-512", "C++ function"),
        ("torch", "reference/matmul.py", "any device", "plain PyTorch"),
    ]
    for i, (name, place, where, kernel) in enumerate(backends):
        x = 20 + 190 * i
        f.arrow((390, 206), (390, 226), (x + 85, 226), (x + 85, 246))
        f.box(x, 246, 170, 64, [name, where, place], GREEN)
        f.arrow((x + 85, 310), (x + 85, 328))
        f.arrow((x + 85, 354), (x + 85, 372))
        f.box(x, 372, 170, 36, [kernel], PURPLE)
    f.rect(20, 328, 740, 26, PALE, 6)
    line = "launcher: checks the arguments, allocates the outputs, chooses the tile, launches"
    f.text(390, 345, line, 12)
    return f


def block_scaling() -> Figure:
    f = Figure(780, 380, "FP8 block scaling and promotion")
    f.text(175, 30, "A, FP8 [M, K]", bold=True)
    f.text(175, 47, "one scale per 1 x 128", 11, color=GRAY)
    for row in range(4):
        for j in range(3):
            active = row == 1 and j == 1
            f.rect(55 + 80 * j, 58 + 22 * row, 80, 22, ORANGE if active else PALE)
            if row == 1:
                f.text(95 + 80 * j, 73 + 22 * row, f"a_scale[m, {j}]", 10, color=GRAY)
    f.text(45, 95, "m", 12, "end")
    f.text(175, 180, "B, FP8 [N, K]", bold=True)
    f.text(175, 197, "one scale per 128 x 128", 11, color=GRAY)
    for row in range(2):
        for j in range(3):
            active = row == 0 and j == 1
            f.rect(55 + 80 * j, 208 + 60 * row, 80, 60, ORANGE if active else PALE)
            f.text(95 + 80 * j, 242 + 60 * row, f"b_scale[{row}, {j}]", 10, color=GRAY)
    f.text(45, 242, "n", 12, "end")
    for j in range(3):
        f.text(95 + 80 * j, 346, f"block {j}", 11, color=GRAY)
    f.text(175, 364, "K, 128 values per block", 11, color=GRAY)

    f.text(560, 30, "For each block j of K", bold=True)
    f.box(430, 58, 260, 56, ["tensor core", "Σ a[m, k] · b[n, k] over 128 values of k"], BLUE)
    f.arrow((295, 91), (430, 80))
    f.arrow((295, 238), (362, 238), (362, 100), (430, 100))
    f.arrow((560, 114), (560, 150), label="about 14 bits on Hopper", dx=8, dy=4)
    f.box(430, 150, 260, 56, ["promotion", "fma(sum, a_scale · b_scale, accumulator)"], ORANGE)
    f.arrow((560, 206), (560, 242), label="every 128 values", dx=8, dy=4)
    f.box(430, 242, 260, 56, ["accumulator", "fp32 registers, one per value of D"], GREEN)
    f.arrow((690, 270), (735, 270), (735, 86), (690, 86))
    f.text(742, 182, "j + 1", 11, "start", GRAY)
    f.arrow((560, 298), (560, 334), label="+ c, one rounding", dx=8, dy=4)
    f.text(560, 353, "D [M, N] in bf16, fp16 or fp32", 12, bold=True)
    return f


def split_k() -> Figure:
    f = Figure(780, 400, "Swapped operands and split-K for few rows")
    f.text(185, 30, "Swapped operands (M = 8)", bold=True)
    f.text(185, 47, "the left operand has at least 64 rows", 11, color=GRAY)
    f.text(20, 76, "A left:", 12, "start")
    f.rect(30, 88, 120, 12, ORANGE)
    f.rect(30, 100, 120, 84, PALE)
    f.text(90, 98, "A: 8 rows", 10)
    f.text(90, 146, "56 rows of padding", 11, color=GRAY)
    f.text(168, 140, "x", 14)
    f.rect(186, 88, 120, 96, BLUE)
    f.text(246, 140, "Bᵀ: 64 columns", 11)
    f.text(168, 208, "7/8 of the products are padding", 11, color=GRAY)
    f.text(20, 246, "B left:", 12, "start")
    f.rect(30, 258, 120, 96, BLUE)
    f.text(90, 310, "B: 64 rows", 11)
    f.text(168, 310, "x", 14)
    f.rect(186, 258, 14, 96, ORANGE)
    f.rect(200, 258, 14, 96, PALE)
    f.text(224, 302, "Aᵀ: 16 columns,", 11, "start")
    f.text(224, 318, "8 of them used", 11, "start", GRAY)
    f.text(168, 378, "1/2 of the products are padding", 11, color=GRAY)

    f.parts.append(f'<line x1="375" y1="20" x2="375" y2="380" stroke="{LINE}"/>')
    f.text(580, 30, "Split-K", bold=True)
    f.text(580, 47, "more programs where N gives few tiles", 11, color=GRAY)
    f.text(400, 84, "K", 12)
    for s in range(4):
        x = 415 + 86 * s
        f.rect(x, 68, 86, 26, (ORANGE, BLUE, PURPLE, GREEN)[s])
        f.text(x + 43, 85, f"split {s}", 11)
        f.arrow((x + 43, 94), (x + 43, 128))
        f.box(x + 4, 128, 78, 44, ["mainloop", f"program {s}"], PALE)
        f.arrow((x + 43, 172), (x + 43, 206))
        f.rect(x + 10, 206, 66, 30, (ORANGE, BLUE, PURPLE, GREEN)[s])
        f.text(x + 43, 225, "fp32", 11)
        f.arrow((x + 43, 236), (x + 43, 288))
    f.rect(500, 249, 174, 20, WHITE, stroke=WHITE)
    f.text(587, 263, "partial sums [splits, M, N]", 11, color=GRAY)
    f.box(
        415,
        288,
        344,
        44,
        ["second kernel", "adds the partial sums in the order 0, 1, 2, 3; + c"],
        BLUE,
    )
    f.arrow((587, 332), (587, 362))
    f.text(587, 378, "D [M, N]", 12, bold=True)
    return f


def mla_decode() -> Figure:
    f = Figure(780, 400, "MLA decode: splits of a sequence and their combination")
    f.text(20, 30, "Cached tokens of one sequence, in pages", 13, "start", bold=True)
    f.text(
        20,
        47,
        "512 latents (key and value of all heads) and 64 RoPE values each",
        11,
        "start",
        GRAY,
    )
    colors = (ORANGE, BLUE, PURPLE)
    for i in range(24):
        f.rect(20 + 31 * i, 58, 31, 30, colors[i // 8])
    for s in range(3):
        x = 20 + 248 * s
        f.text(x + 124, 104, f"split {s}", 11, color=GRAY)
        f.arrow((x + 124, 110), (x + 124, 140))
        f.box(x + 14, 140, 220, 84, [f"program of split {s}", "scores = q · K · softmax_scale",
                                     "row_max, row_sum, alpha (online)", "out_i = softmax · V"],
              colors[s])  # fmt: skip
        f.arrow((x + 124, 224), (x + 124, 286))
    f.text(268, 250, "out_i fp32 [rows, 512]", 11, color=GRAY)
    f.text(268, 266, "lse_i fp32 [rows]", 11, color=GRAY)
    f.text(516, 250, "out_i fp32 [rows, 512]", 11, color=GRAY)
    f.text(516, 266, "lse_i fp32 [rows]", 11, color=GRAY)
    sums = "lse = log Σ exp(lse_i);  out = Σ exp(lse_i - lse) · out_i, in the order of the splits"
    f.box(34, 286, 716, 44, ["combine", sums], GREEN)
    f.arrow((392, 330), (392, 356))
    f.text(392, 374, "out [B, Sq, H, 512], lse [B, H, Sq]", 12, bold=True)
    rows = "rows of a tile: the Sq · H queries of the sequence, which read the same tokens"
    f.text(392, 391, rows, 11, color=GRAY)
    return f


def moe_layer() -> Figure:
    f = Figure(780, 470, "Steps of the expert layer (moe_forward)")
    steps = [
        ("route_topk", "weights, topk_idx [T, topk]", PALE),
        ("dispatch: place", "sort assignments by expert: handle, group bounds", ORANGE),
        ("dispatch: copy", "cast each token to FP8 once, copy its row to each expert", ORANGE),
        ("gate and up product", "FP8 grouped GEMM: a · w13ᵀ -> [rows, 2I]", BLUE),
        ("SwiGLU and cast", "silu(gate) · up -> FP8 [rows, I]", GREEN),
        ("down product", "FP8 grouped GEMM: h · w2ᵀ -> [rows, K]", BLUE),
        ("combine", "out[t] = Σ_j weights[t, j] · y[handle[t, j]], fixed order", PURPLE),
    ]
    for i, (name, what, fill) in enumerate(steps):
        y = 20 + 62 * i
        f.box(20, y, 380, 44, [name, what], fill)
        if i:
            f.arrow((210, y - 18), (210, y))
    f.text(210, 456, "out [T, K]", 12, bold=True)

    f.text(600, 36, "Example: T = 3, topk = 2, E = 3", bold=True)
    f.text(455, 66, "tokens", 11, color=GRAY)
    f.text(690, 66, "rows by expert", 11, color=GRAY)
    tokens = {"t0": (96, BLUE), "t1": (176, GREEN), "t2": (256, PURPLE)}
    rows = [("t0", 0), ("t2", 0), ("t0", 1), ("t1", 1), ("t1", 2), ("t2", 2)]
    for name, (y, fill) in tokens.items():
        f.rect(430, y, 50, 26, fill, 4)
        f.text(455, y + 18, name, 12)
    for i, (name, expert) in enumerate(rows):
        y = 80 + 34 * i + 12 * expert
        start, fill = tokens[name]
        f.rect(660, y, 60, 24, fill, 4)
        f.text(690, y + 17, name, 12)
        f.arrow((480, start + 13), (660, y + 12))
        if i % 2 == 0:
            f.text(730, y + 34, f"e{expert}", 12, "start")
    f.text(600, 330, "Each expert multiplies its rows with its own weights.", 11, color=GRAY)
    f.text(600, 348, "An expert without rows costs nothing.", 11, color=GRAY)
    f.text(600, 366, "No step waits for the host: sizes stay on the device.", 11, color=GRAY)
    return f


def producer_consumer() -> Figure:
    f = Figure(780, 340, "Producer and consumer warps of the FP8 products, with a ring of 3 stages")

    def x(t):  # of time t, in halves of a consumer's step
        return 150 + 66 * t

    def bar(t, duration, y, line, fill, height=26):
        f.rect(x(t), y, 66 * duration, height, fill)
        f.text(x(t + duration / 2), y + height / 2 + 4, line, 11)

    note = "Time runs to the right; k0, k1, ... are steps of 128 values of K."
    f.text(20, 28, note, 12, "start", GRAY)
    f.text(140, 63, "producer (TMA)", 12, "end")
    loads = [(0, 0), (1, 1), (2, 2), (3, 3), (5, 4), (7, 5)]  # (start, step)
    for t, k in loads:
        bar(t, 1, 46, f"load k{k}", PURPLE)
    for t in (4, 6):
        bar(t, 1, 46, "wait empty", WHITE)
    for stage in range(3):
        y = 96 + 30 * stage
        f.text(140, y + 16, f"stage {stage}", 12, "end")
        f.rect(x(0), y, 66 * 9, 22, WHITE)
    for t, k in loads:
        released = min(2 * k + 3, 9)
        bar(t + 1, released - t - 1, 96 + 30 * (k % 3), f"full: k{k}", ORANGE, 22)
    for group in range(2):
        y = 206 + 40 * group
        f.text(140, y + 17, f"consumer {group}", 12, "end")
        for k in range(4):
            start = 2 * k + 1 + group
            bar(start, 1, y, f"WGMMA k{k}", BLUE)
            if start + 1 < 9:
                bar(start + 1, 1, y, f"promote k{k}", GREEN)
    f.arrow((x(1), 118), (x(1), 206), label="full", dx=5, dy=20)
    f.arrow((x(3), 246), (x(3), 72), label="empty", dx=5, dy=42)
    note = "A stage is empty after both consumers' WGMMAs. One promotes while the other multiplies."
    f.text(20, 304, note, 12, "start", GRAY)
    f.text(20, 324, "The kernels have 4 to 10 stages.", 12, "start", GRAY)
    return f


def seesaw() -> Figure:
    f = Figure(780, 330, "Seesaw schedule of mla_decode on Hopper")
    wide = {"Q·K": 80, "softmax": 76, "P·V": 96}

    def box(x, y, w, line, fill, height=40, size=11):
        f.rect(x, y, w, height, fill)
        f.text(x + w / 2, y + height / 2 + 4, line, size)

    title = "Two consumer warpgroups, two tiles of 64 tokens in shared memory"
    f.text(20, 28, title, 13, "start", bold=True)
    f.text(110, 75, "producer", 12, "end")
    f.text(110, 160, "warpgroup 0", 12, "end")
    f.text(110, 260, "warpgroup 1", 12, "end")
    loads = {120: "tile 0", 180: "tile 1", 446: "2, left", 506: "2, right",
             594: "3, left", 654: "3, right"}  # fmt: skip
    for x, line in loads.items():
        box(x, 56, 60, line, PURPLE, 30)
    # Warpgroup 0: scores of even tiles, left half of the output.
    box(180, 136, wide["Q·K"], "Q·K0ᵀ", BLUE)
    box(260, 136, wide["softmax"], "softmax P0", ORANGE)
    box(336, 136, 110, "P0·V0, left", GREEN)
    box(446, 136, 38, "wait", WHITE)
    box(484, 136, 110, "P1·V1, left", GREEN)
    box(594, 136, wide["Q·K"], "Q·K2ᵀ", BLUE)
    box(674, 136, wide["softmax"], "softmax P2", ORANGE)
    # Warpgroup 1: scores of odd tiles, right half.
    box(240, 236, wide["Q·K"], "Q·K1ᵀ", BLUE)
    box(320, 236, 56, "wait", WHITE)
    box(376, 256, 122, "P0·V0, right", GREEN, 20)
    box(376, 236, 96, "softmax P1", ORANGE, 20)
    box(498, 236, 110, "P1·V1, right", GREEN)
    box(608, 236, wide["Q·K"], "Q·K3ᵀ", BLUE)
    box(688, 236, 62, "wait", WHITE)
    f.arrow((336, 176), (376, 266), label="P0, row_max", dx=0, dy=-22)
    f.arrow((472, 236), (472, 206), (484, 206), (484, 176), label="P1, row_max", dx=10, dy=16)
    f.arrow((446, 136), (446, 86), label="left half free", dx=6, dy=4)
    note = (
        "Warpgroup 0: scores of even tiles, columns 0-255 of out. Warpgroup 1: odd tiles, 256-511."
    )
    f.text(20, 306, note, 12, "start", GRAY)
    return f


def caught_bug() -> Figure:
    """The first program of compiled.md and the report of its bug."""
    _, program, _, report, *_ = (FOLDER.parent / "compiled.md").read_text().split("```", 4)
    code = program.split("\n\n\n")[1].splitlines()
    first, *rest = report.strip().splitlines()
    summary, place = first.removeprefix("deepkern.KernelFailure: ").split("bounds: ")
    lines = [summary + "bounds:", "  " + place, *rest]
    f = Figure(780, 330, "A load without its mask, and the report of the machine")
    f.text(20, 28, "my_kernel.py", 11, "start", GRAY, mono=True)
    for i, line in enumerate(code):
        y = 52 + 21 * i
        if "mask is missing" in line:
            f.rect(14, y - 15, 752, 21, "#fee2e2", 3, "#fca5a5")
        f.text(24, y, line.replace(" ", "\u00a0"), 13, "start", mono=True)
    f.rect(14, 190, 752, 124, INK, 6, INK)
    for i, line in enumerate(lines):
        color = "#fca5a5" if i < 2 else "#e5e7eb"
        f.text(26, 216 + 22 * i, line.replace(" ", "\u00a0"), 12, "start", color, mono=True)
    return f


FIGURES: dict[str, Callable[[], Figure]] = {
    "call_path": call_path,
    "block_scaling": block_scaling,
    "split_k": split_k,
    "mla_decode": mla_decode,
    "moe_layer": moe_layer,
    "producer_consumer": producer_consumer,
    "seesaw": seesaw,
    "caught_bug": caught_bug,
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
