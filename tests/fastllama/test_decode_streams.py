"""The CUDA stream of a decoder's launches, and its options for dependent launches."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import Llama, decode_graph, step_graphs
from fastllama.cuda_graph import CudaGraph
from fastllama.decode_graph import Decoder
from fastllama.kernels import batch
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.launch.options import LaunchOptions, launch_options, override_launch_options
from fastllama.step_graphs import StepGraphs
from tests.support.fake_graph import RecordedGraph
from tests.support.tiny import tiny_llama

PROMPTS = [[5, 6, 7], [8]]
CALL: dict[str, Any] = {"temperature": 0.0}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), backend="reference")


@pytest.fixture
def seen(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[LaunchOptions]:
    """The launch options in effect in every step and prefill that runs."""
    found: list[LaunchOptions] = []
    hidden = llm.model.hidden

    def noted(batch: RaggedBatch) -> Tensor:
        found.append(launch_options())
        return hidden(batch)

    monkeypatch.setattr(llm.model, "hidden", noted)
    return found


class Stream:
    """A fake CUDA stream, current within `use`."""

    current: "Stream"

    def __init__(self, name: str) -> None:
        self.name = name
        self.waited: list[str] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other.name)

    @contextmanager
    def use(self) -> Iterator[None]:
        before, Stream.current = Stream.current, self
        try:
            yield
        finally:
            Stream.current = before


@pytest.fixture
def decoder(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """A decoder that sees its model on a GPU while it reads the current stream."""

    class OnGpu(StepGraphs):
        def use_current_stream(self) -> None:
            device, self.model.device = self.model.device, torch.device("cuda", 0)
            try:
                super().use_current_stream()
            finally:
                self.model.device = device

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream.current)
    monkeypatch.setattr(torch.cuda, "stream", Stream.use)
    Stream.current = Stream("the default")
    monkeypatch.setattr(decode_graph, "StepGraphs", OnGpu)
    return Decoder(llm.model)


def test_a_call_keeps_the_stream_on_which_it_starts(
    llm: Llama, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran_on: list[str] = []
    step = step_graphs.step

    def noted(*arguments: Any, **options: Any) -> None:
        ran_on.append(Stream.current.name)
        step(*arguments, **options)

    monkeypatch.setattr(step_graphs, "step", noted)
    monkeypatch.setattr(llm, "decoder", decoder)
    first, second = Stream("first"), Stream("second")
    with first.use():
        stream = llm.stream(PROMPTS, 4, **CALL)
        next(stream)
    with second.use():
        next(stream)
    list(stream)
    assert set(ran_on) == {"first"} and len(ran_on) == 3
    with second.use():
        llm.generate(PROMPTS, 2, **CALL)
    assert ran_on[3:] == ["second"]
    assert second.waited == ["first"] and not first.waited, "steps of the previous call may still run"


def test_sampling_parameters_are_uploaded_on_the_stream_that_reads_them(
    llm: Llama, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded_on: list[str] = []
    upload = batch.upload

    def noted(*arguments: Any) -> Tensor:
        uploaded_on.append(Stream.current.name)
        return upload(*arguments)

    monkeypatch.setattr(llm, "decoder", decoder)
    llm.generate(PROMPTS, 1, **CALL)  # allocates the decoder's state
    monkeypatch.setattr(batch, "upload", noted)
    with Stream("at the call").use():
        stream = llm.stream(PROMPTS, 2, temperature=1.0, seed=1)
    with Stream("at the first step").use():
        list(stream)
    assert set(uploaded_on) == {"at the first step"}


def test_the_workspace_is_reset_again_for_another_stream(
    llm: Llama, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "decoder", decoder)
    resets: list[str] = []
    monkeypatch.setattr(type(llm.model.workspace), "reset", lambda self: resets.append(Stream.current.name))
    for name, expected in (("a", 1), ("b", 2)):
        with Stream(name).use():
            llm.generate(PROMPTS, 1, **CALL)
        assert resets.count(name) == expected, "before the call, and again after waiting for the previous stream"


def test_a_decoder_has_its_own_options(llm: Llama, seen: list[LaunchOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    for dependent, expected in ((None, LaunchOptions()), (True, LaunchOptions()), (False, LaunchOptions(False, False))):
        monkeypatch.setattr(llm, "decoder", Decoder(llm.model, dependent=dependent))
        seen.clear()
        stream = llm.stream(PROMPTS, 3, **CALL)
        next(stream)
        assert launch_options() == LaunchOptions(), "between two increments the caller's launch options are in effect"
        list(stream)
        assert len(seen) == 3 and set(seen) == {expected}
    monkeypatch.setattr(llm, "decoder", Decoder(llm.model))
    seen.clear()
    with override_launch_options(dependent=False):
        llm.generate(PROMPTS, 1, **CALL)
    assert set(seen) == {LaunchOptions(False, True)}


def test_launch_options_affect_one_thread_only() -> None:
    found: list[LaunchOptions] = []
    with override_launch_options(dependent=False, prefetch=False):
        thread = threading.Thread(target=lambda: found.append(launch_options()))
        thread.start()
        thread.join()
        assert launch_options() == LaunchOptions(False, False)
    assert found == [LaunchOptions()] == [launch_options()]


class NoDependentLaunch(RecordedGraph):
    """A graph whose capture fails with dependent launches."""

    def capture(self, launches: Any) -> None:
        if launch_options().dependent:
            raise RuntimeError("operation not permitted when stream is capturing")
        super().capture(launches)


def test_a_failed_capture_is_repeated_without_dependent_launches(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = llm.generate(PROMPTS, 4, **CALL)
    monkeypatch.setattr(llm, "decoder", Decoder(llm.model, new_graph=NoDependentLaunch))
    with pytest.raises(RuntimeError, match=r"^operation not permitted when stream is capturing$"):
        llm.generate(PROMPTS, 4, **CALL)  # the reference backend has no dependent launches to turn off
    monkeypatch.setattr(llm.model.ops, "uses_dependent_launch", lambda: launch_options().dependent)
    monkeypatch.setattr(llm, "decoder", Decoder(llm.model, new_graph=NoDependentLaunch))
    assert llm.decoder.dependent
    assert llm.generate(PROMPTS, 4, **CALL) == expected
    assert not llm.decoder.dependent
    (record,) = caplog.records
    assert record.getMessage() == (
        "a graph with dependent launches could not be captured (operation not permitted when stream is capturing): "
        "this model runs without them from now on, as with dependent_launch=False"
    )
    monkeypatch.setattr(llm, "decoder", Decoder(llm.model, new_graph=NoDependentLaunch, dependent=False))
    assert llm.generate(PROMPTS, 4, **CALL) == expected and len(caplog.records) == 1


class OutOfMemoryOnce(RecordedGraph):
    """A graph whose first capture runs out of memory."""

    n_tries = 0

    def capture(self, launches: Any) -> None:
        OutOfMemoryOnce.n_tries += 1
        if OutOfMemoryOnce.n_tries == 1:
            raise torch.OutOfMemoryError("out of memory")
        super().capture(launches)


def test_out_of_memory_leaves_dependent_launches_on(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate(PROMPTS, 4, **CALL)
    monkeypatch.setattr(llm.model.ops, "uses_dependent_launch", lambda: launch_options().dependent)
    monkeypatch.setattr(llm, "decoder", Decoder(llm.model, new_graph=OutOfMemoryOnce))
    with pytest.raises((torch.OutOfMemoryError, MemoryError)):
        llm.generate(PROMPTS, 4, **CALL)
    assert llm.decoder.dependent and OutOfMemoryOnce.n_tries == 1
    assert llm.generate(PROMPTS, 4, **CALL) == expected


def test_a_failed_dry_run_names_the_option(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: RuntimeError) -> Any:
        def step(*arguments: Any) -> None:
            raise error

        return step

    refused = RuntimeError("Triton Error [CUDA]: operation not supported")
    named = (
        f"a decode step of 2 rows failed ({refused}): if dependent launches are the cause, dependent_launch=False "
        "turns them off"
    )
    full = torch.OutOfMemoryError("out of memory")
    for depend, error, message in ((True, refused, named), (False, refused, str(refused)), (True, full, str(full))):
        monkeypatch.setattr(llm.model.ops, "uses_dependent_launch", lambda depend=depend: depend)
        monkeypatch.setattr(step_graphs, "step", failing(error))
        with pytest.raises(type(error)) as caught:
            Decoder(llm.model).dry_run(2)
        assert str(caught.value) == message


class FailedCapture:
    """A fake torch.cuda.graph whose exit raises and leaves the capture's stream current, as torch does."""

    def __init__(self, graph: object, stream: Stream, **how: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        Stream.current = self.stream

    def __exit__(self, *error: object) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_failed_capture_raises_the_cause_and_restores_the_stream(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", FailedCapture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(CudaGraph, "_failed", [])
    before, capture_stream = Stream.current, Stream("the capture's")
    capture_stream.device = torch.device("cuda", 0)  # type: ignore[attr-defined]

    def full() -> None:
        raise torch.OutOfMemoryError("out of memory")

    for launches, error, message in (
        (full, torch.OutOfMemoryError, "^out of memory$"),
        (lambda: None, RuntimeError, "^operation failed due to a previous error during capture$"),
    ):
        graph = CudaGraph(capture_stream, pool=None)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            graph.capture(launches)
        assert Stream.current is before
        assert CudaGraph._failed[-1] is graph._graph, "torch's allocator may still point to it"


def test_build_passes_its_launch_options_to_the_decoder(tmp_path: Path) -> None:
    tiny_llama(tmp_path)  # writes the checkpoint
    files = (str(tmp_path), str(tmp_path / "tokenizer.model"), 16, 2)
    llm = Llama.build(*files, device="cpu", cuda_graphs=False, dependent_launch=False)
    assert (llm.decoder.graphs.use_graphs, llm.decoder.graphs.dependent) == (False, False)
    llm = Llama.build(*files, device="cpu")
    assert (llm.decoder.graphs.use_graphs, llm.decoder.graphs.dependent) == (None, None)
