"""How one program of `matvec` reads its rows of a weight: Llama 3 8B's output projection on an H200."""

from docs.pictures.svg import BLUE, GREEN, GREY, INK, LINE, MUTED, ORANGE, PURPLE, Drawing
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS
from fastllama.kernels.launch.sizes import ceil_div
from fastllama.kernels.launch.target import Target
from fastllama.kernels.projection.matvec import LOAD_BYTES, Launch, _launch_of

ROWS = COLUMNS = 4096
BYTES = 2  # of a bfloat16
GRID_LEFT, GRID_WIDTH, GRID_TOP, ROW = 330, 500, 112, 30
REGISTER_BYTES = 4


def draw() -> str:
    """The picture."""
    gpu = GPUS["sm_90"]
    target = Target(gpu.backend, gpu.arch, gpu.processors, gpu.shared_bytes, gpu.warp_size)
    launch = _launch_of(ROWS, COLUMNS, BYTES, 1, target)
    assert launch is not None
    threads = launch.warps * gpu.warp_size
    drawing = Drawing(612, "How a program of the matrix-vector kernel reads, multiplies and reduces")
    drawing.text(20, 30, "A program of matvec owns a few complete rows of the weight", size=17, bold=True)
    drawing.text(20, 52, "Llama 3 8B, output projection, one token, bfloat16, launch table of an H200", fill=MUTED)
    _weight(drawing, launch)
    _load(drawing, launch, threads)
    _thread(drawing, launch, threads)
    _reduction(drawing, launch, threads, gpu.warp_size)
    return drawing.svg()


def _weight(drawing: Drawing, launch: Launch) -> None:
    """The complete weight, and one program's rows and chunks of it."""
    side, left, top = 160, 42, 104
    programs, chunks = ceil_div(ROWS, launch.rows), COLUMNS // launch.chunk
    drawing.text(20, 84, f"Weight: {ROWS} × {COLUMNS}", bold=True)
    drawing.rectangle(left, top, side, side, fill=GREY, stroke=LINE)
    for band in range(1, 16):
        drawing.line(left, top + band * 10, left + side, top + band * 10, stroke=LINE)
    drawing.rectangle(left, top + 60, side, 10, fill=BLUE)
    drawing.text(20, top + side + 20, f"{programs:,} programs,")
    drawing.text(20, top + side + 38, f"{launch.rows} rows each (not to scale)")
    bottom = GRID_TOP + launch.rows * ROW
    corners = (left + side, top + 60), (GRID_LEFT, GRID_TOP), (GRID_LEFT, bottom), (left + side, top + 70)
    drawing.polygon(*corners, fill=BLUE, opacity=0.15)
    drawing.badge(GRID_LEFT + 11, 84, "1")
    tile = launch.rows * COLUMNS * BYTES // 1024
    drawing.text(GRID_LEFT + 30, 88, f"Request the complete tile, {tile} KB, before using any of it", bold=True)
    width = GRID_WIDTH / chunks
    for row in range(launch.rows):
        y = GRID_TOP + row * ROW
        drawing.text(GRID_LEFT - 8, y + 19, f"row {row}", size=12, anchor="end")
        for chunk in range(chunks):
            drawing.rectangle(GRID_LEFT + chunk * width, y, width - 3, ROW - 4, fill=BLUE)
    for chunk in range(chunks):
        drawing.text(GRID_LEFT + (chunk + 0.5) * width - 1, 107, f"chunk {chunk}", size=12, anchor="middle", fill=MUTED)


def _load(drawing: Drawing, launch: Launch, threads: int) -> None:
    """One row's chunk: a load of 16 bytes for each thread."""
    top, shown, last = GRID_TOP + launch.rows * ROW + 42, 5, 1
    bottom, chunk_width = GRID_TOP + launch.rows * ROW - 4, GRID_WIDTH / (COLUMNS // launch.chunk) - 3
    corners = (GRID_LEFT, bottom), (GRID_LEFT + chunk_width, bottom), (GRID_LEFT + GRID_WIDTH, top), (GRID_LEFT, top)
    drawing.polygon(*corners, fill=BLUE, opacity=0.15)
    each = LOAD_BYTES // BYTES
    label = f"One chunk of one row, {launch.chunk:,} weights: {threads} threads, {LOAD_BYTES} bytes each"
    drawing.text(GRID_LEFT + 6, top - 8, label)
    width = GRID_WIDTH / (shown + 1 + last)
    for place in range(shown + 1 + last):
        x = GRID_LEFT + place * width
        if place == shown:
            drawing.text(x + width / 2, top + 20, "…", size=16, anchor="middle")
            continue
        number = place if place < shown else threads - 1
        for weight in range(each):
            drawing.rectangle(x + weight * (width - 4) / each, top, (width - 4) / each - 1, 16, fill=BLUE)
        drawing.text(x + width / 2 - 2, top + 32, f"thread {number}", size=12, anchor="middle")


def _thread(drawing: Drawing, launch: Launch, threads: int) -> None:
    """A thread's registers, the part of x that meets them, and its sums."""
    top, chunks, each = 362, COLUMNS // launch.chunk, LOAD_BYTES // BYTES
    loads = launch.rows * chunks
    drawing.line(20, top - 22, 840, top - 22)
    drawing.badge(31, top, "2")
    drawing.text(50, top + 4, "Keep weights in registers", bold=True)
    for row in range(launch.rows):
        for chunk in range(chunks):
            drawing.rectangle(50 + chunk * 46, top + 18 + row * 24, 42, 20, fill=BLUE, label=f"{each}", size=12)
    held = loads * LOAD_BYTES
    drawing.text(50, top + 134, f"each of {threads} threads: {loads} loads,")
    drawing.text(50, top + 152, f"{held} bytes, {held // REGISTER_BYTES} registers")
    drawing.badge(315, top, "3")
    drawing.text(334, top + 4, "Wait for x, then read it", bold=True)
    for chunk in range(chunks):
        drawing.rectangle(334 + chunk * 46, top + 54, 42, 20, fill=GREEN, label=f"{each}", size=12)
    drawing.text(274, top + 70, "×", size=20, anchor="middle")
    drawing.text(334, top + 98, f"{COLUMNS} elements, {COLUMNS * BYTES // 1024} KB, from L2;")
    drawing.text(334, top + 116, "with a norm: its mean square first")
    drawing.badge(605, top, "4")
    drawing.text(624, top + 4, "Multiply and add in float32", bold=True)
    for row in range(launch.rows):
        drawing.rectangle(624, top + 18 + row * 24, 92, 20, fill=ORANGE, label=f"{each} sums", size=12)
        drawing.text(724, top + 33 + row * 24, f"row {row}", size=12)
    drawing.arrow(536, top + 64, 612, top + 64)
    drawing.text(624, top + 134, f"each thread: {launch.rows} × {each} sums")
    drawing.text(624, top + 152, f"over {chunks} chunks")


def _reduction(drawing: Drawing, launch: Launch, threads: int, warp_size: int) -> None:
    """From the threads' sums to the results."""
    top, each = 546, LOAD_BYTES // BYTES
    drawing.line(20, top - 16, 840, top - 16)
    drawing.badge(31, top + 22, "5")
    drawing.text(50, top + 26, "Reduce once", bold=True)
    steps = (
        (f"{each} sums → 1", "in a thread", ORANGE),
        (f"{warp_size} threads → 1", "shuffles in a warp", ORANGE),
        (f"{launch.warps} warps → 1", "shared memory", ORANGE),
        ("+ residual → h", f"{launch.rows} results, stored", PURPLE),
    )
    for index, (what, where, fill) in enumerate(steps):
        x = 160 + index * 176
        drawing.rectangle(x, top, 146, 24, fill=fill, label=what, size=13)
        drawing.text(x + 73, top + 42, where, size=12, anchor="middle")
        if index:
            drawing.arrow(x - 28, top + 12, x - 3, top + 12, stroke=INK)
