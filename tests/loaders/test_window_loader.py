from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from contextlib import closing
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from benchmarks.gpu_profile import copies_overlapped
from distaccum import UserError, WindowLoader
from distaccum.loaders import EvaluationLoader, LoaderOptions
from distaccum.planning.costs import CostModel
from distaccum.runtime.randomness import GlobalStates


class Numbers(Dataset[tuple[torch.Tensor, int]]):
    """Sample i is (i, i): what has been loaded shows which samples it was."""

    def __init__(self, num_samples: int, bad: int | None = None) -> None:
        self.num_samples = num_samples
        self.bad = bad

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == self.bad:
            raise OSError("disk on fire")
        return torch.tensor(float(index)), index


def _loaded(loader: WindowLoader, epoch: int) -> list[list[list[int]]]:
    """Samples of each window's micro-batches, as they came out of the dataset; placeholders left out."""
    return [
        [batch[1].tolist() for batch, size in zip(window, window.sizes, strict=True) if size]
        for window in loader.epoch(epoch)
    ]


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 60), st.integers(4, 30), st.integers(1, 9), st.integers(0, 3), st.booleans(), st.booleans())
def test_windows_are_the_same_for_every_world_size(
    num_samples: int, global_batch_size: int, micro_batch_size: int, epoch: int, drop_last: bool, equal: bool
) -> None:
    global_batch_size = min(global_batch_size, num_samples)
    windows = {}
    for world_size in (1, 2, 3, 4):
        ranks = [
            _loaded(
                WindowLoader(
                    Numbers(num_samples),
                    global_batch_size=global_batch_size,
                    micro_batch_size=min(micro_batch_size, global_batch_size),
                    drop_last=drop_last,
                    seed=3,
                    rank=rank,
                    world_size=world_size,
                    equal_micro_steps=equal,
                ),
                epoch,
            )
            for rank in range(world_size)
        ]
        windows[world_size] = [
            [sample for rank in ranks for micro_batch in rank[index] for sample in micro_batch]
            for index in range(len(ranks[0]))
        ]
    assert windows[1] == windows[2] == windows[3] == windows[4]
    seen = Counter(sample for window in windows[1] for sample in window)
    assert set(seen.values()) == {1}
    assert len(seen) == num_samples - (num_samples % global_batch_size if drop_last else 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_epoch_has_an_order_of_its_own_and_repeats(num_workers: int) -> None:
    options = LoaderOptions(num_workers=num_workers, persistent_workers=num_workers > 0)
    loader = WindowLoader(Numbers(20), global_batch_size=8, micro_batch_size=3, options=options)
    first, second = ([[b[1].tolist() for b in window] for window in loader] for _ in range(2))
    assert first != second
    assert sorted(i for w in second for b in w for i in b) == list(range(20))
    assert (_loaded(loader, 0), _loaded(loader, 1)) == (first, second)
    assert [len(batch) for batch in first[-1]] == [2, 2]


def test_a_window_can_be_jumped_to() -> None:
    loader = WindowLoader(Numbers(30), global_batch_size=8, micro_batch_size=3)
    assert [[b[1].tolist() for b in w] for w in loader.epoch(2, first_window=2)] == _loaded(loader, 2)[2:]


def test_a_window_left_in_the_middle_does_not_shift_the_next() -> None:
    loader = WindowLoader(Numbers(30), global_batch_size=8, micro_batch_size=2)
    wanted = _loaded(loader, 0)
    found = [next(iter(window))[1].tolist() for window in loader.epoch(0)]
    assert found == [window[0] for window in wanted]


def test_a_window_knows_its_samples() -> None:
    loader = WindowLoader(Numbers(21), global_batch_size=8, micro_batch_size=3, rank=1, world_size=2)
    for window in loader.epoch(1):
        assert window.sample_indices == [batch[1].tolist() for batch in window]
        assert window.num_samples == (8 if window.index < 2 else 5)


def test_a_placeholder_is_a_sample_of_the_window() -> None:
    options: dict[str, Any] = {"global_batch_size": 4, "micro_batch_size": 1, "world_size": 4}
    ranks = [list(WindowLoader(Numbers(5), rank=rank, **options).epoch(0)) for rank in range(4)]
    last = [rank[-1] for rank in ranks]
    assert [window.sizes for window in last] == [(1,), (0,), (0,), (0,)]
    assert [window.sample_indices for window in last][1:] == [[[]], [[]], [[]]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_raises_is_named(num_workers: int) -> None:
    loader = WindowLoader(
        Numbers(20, bad=13), global_batch_size=5, micro_batch_size=5, options=LoaderOptions(num_workers=num_workers)
    )
    with pytest.raises(UserError, match="sample 13 of the training data could not be loaded: OSError: disk on fire"):
        _loaded(loader, 0)


def test_samples_that_do_not_fit_together_are_named() -> None:
    def collate(samples: list[Any]) -> Any:
        raise ValueError("no")

    loader = WindowLoader(Numbers(4), global_batch_size=2, micro_batch_size=2, collate_fn=collate)
    with pytest.raises(UserError, match=r"micro-batch of samples \[\d, \d\] of the training data .* ValueError: no"):
        _loaded(loader, 0)


def test_batched_fetching_is_used_where_the_dataset_has_it() -> None:
    class Batched(Numbers):
        def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
            return [(torch.tensor(0.0), -index) for index in indices]

    window = next(iter(WindowLoader(Batched(6), global_batch_size=6, micro_batch_size=6)))
    assert sorted(next(iter(window))[1].tolist()) == [-5, -4, -3, -2, -1, 0]


class Noisy(Numbers):
    """Sample i is i and a number from each library; some samples draw more than others, some nothing at all."""

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        if index % 3 == 0:
            return index, 0.0, 0.0, 0.0
        noise = [(random.gauss(0, 1), float(np.random.randn()), torch.randn(()).item()) for _ in range(index % 3)]
        return index, *noise[-1]


class Stateful(Numbers):
    """Fault: noise from a generator of its own that goes on from sample to sample."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples)
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        return index, self.generator.random()


def _samples(batch: Any) -> list[tuple[float, ...]]:
    return list(zip(*(column.tolist() for column in batch), strict=True))


def _noise(
    dataset: Dataset[Any], epoch: int, *, num_workers: int = 0, world_size: int = 1, seed: int = 3, **batch: int
) -> dict[int, tuple[float, ...]]:
    """What each sample of an epoch came out as, loaded by all ranks."""
    found: dict[int, tuple[float, ...]] = {}
    options = LoaderOptions(num_workers=num_workers, persistent_workers=num_workers > 0)
    for rank in range(world_size):
        loader = WindowLoader(dataset, seed=seed, options=options, rank=rank, world_size=world_size, **batch)
        with closing(loader):
            for window in loader.epoch(epoch):
                for micro_batch, size in zip(window, window.sizes, strict=True):
                    found |= {int(index): noise for index, *noise in _samples(micro_batch) if size}  # type: ignore[misc]
    return found


@settings(deadline=None, max_examples=30)
@given(
    num_samples=st.integers(4, 40),
    global_batch_size=st.integers(4, 30),
    micro_batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_random_numbers_do_not_depend_on_the_cut(
    num_samples: int, global_batch_size: int, micro_batch_size: int, world_size: int, epoch: int
) -> None:
    size = min(global_batch_size, num_samples)
    whole = _noise(Noisy(num_samples), epoch, global_batch_size=size, accumulation_steps=1)
    batch = {"global_batch_size": size, "micro_batch_size": min(micro_batch_size, size)}
    assert _noise(Noisy(num_samples), epoch, world_size=world_size, **batch) == whole


def test_random_numbers_do_not_depend_on_workers() -> None:
    batch = {"global_batch_size": 12, "micro_batch_size": 3}
    wanted = _noise(Noisy(40), 1, **batch)
    assert _noise(Noisy(40), 1, num_workers=2, **batch) == wanted
    assert _noise(Noisy(40), 1, num_workers=1, world_size=2, global_batch_size=12, micro_batch_size=8) == wanted


def test_random_numbers_differ_between_epochs_samples_and_seeds() -> None:
    found = [
        _noise(Noisy(40), epoch, seed=seed, global_batch_size=12, micro_batch_size=3)
        for epoch, seed in ((0, 3), (1, 3), (0, 4))
    ]
    numbers = [number for noise in found for sample in noise.values() for number in sample if number]
    assert len(numbers) == len(set(numbers)) == 3 * 3 * 26


def test_noise_that_depends_on_the_cut_would_be_seen() -> None:
    one = _noise(Stateful(40), 0, global_batch_size=12, micro_batch_size=3)
    assert _noise(Stateful(40), 0, world_size=2, global_batch_size=12, micro_batch_size=3) != one
    assert _noise(Stateful(40), 0, num_workers=2, global_batch_size=12, micro_batch_size=3) != one


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("persistent", [True, False])
def test_starting_within_an_epoch_gives_the_same_micro_batches(num_workers: int, persistent: bool) -> None:
    options = LoaderOptions(num_workers=num_workers, persistent_workers=persistent and num_workers > 0)

    def load(epoch: int, first_window: int, epochs_before: int) -> list[Any]:
        loader = WindowLoader(Noisy(50), global_batch_size=9, micro_batch_size=2, seed=5, options=options)
        with closing(loader):
            for before in range(epochs_before):
                _loaded_whole(loader, before, 0)
            return _loaded_whole(loader, epoch, first_window)

    undisturbed = load(2, 0, epochs_before=2)
    for first_window in (0, 1, 4):
        assert load(2, first_window, epochs_before=0) == undisturbed[first_window:]


def _loaded_whole(loader: WindowLoader, epoch: int, first_window: int) -> list[Any]:
    return [[_samples(batch) for batch in window] for window in loader.epoch(epoch, first_window)]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("dataset", [Numbers(12), Noisy(12)])
def test_loading_leaves_the_random_states_alone(dataset: Any, num_workers: int) -> None:
    def draw() -> tuple[float, ...]:
        return random.gauss(0, 1), np.random.randn(), torch.randn(()).item()

    options = LoaderOptions(num_workers=num_workers)
    loader = WindowLoader(dataset, global_batch_size=4, micro_batch_size=2, options=options)
    evaluation = EvaluationLoader(dataset, batch_size=5, options=options)
    states = GlobalStates.now()
    with_loading = [draw() for epoch in range(2) for window in loader.epoch(epoch) for _ in window]
    loader.sample_micro_batch(0, 1)
    with_loading += [draw() for _ in evaluation]
    states.put_back()
    assert [draw() for _ in with_loading] == with_loading


def test_evaluations_draw_the_same_numbers() -> None:
    loader = EvaluationLoader(Noisy(12), batch_size=5)
    first = [_samples(batch) for batch in loader]
    assert [_samples(batch) for batch in loader] == first
    ranks = [EvaluationLoader(Noisy(12), batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    other = [sample for loader in ranks for batch in loader for sample in _samples(batch)]
    assert other == [sample for batch in first for sample in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_first_micro_batch_of_a_window(num_workers: int) -> None:
    options = LoaderOptions(
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        device=torch.device("cpu"),
        float_dtype=torch.float64,
    )
    loader = WindowLoader(Noisy(30), global_batch_size=8, micro_batch_size=3, options=options)
    with closing(loader):
        windows = loader.epoch(1)
        batch = next(iter(next(windows)))
        sample = loader.sample_micro_batch(1, 2)
        assert sample[1].dtype == batch[1].dtype == torch.float64
        next(windows)
        assert _samples(next(iter(next(windows)))) == _samples(sample)


def test_the_first_micro_batch_of_an_idle_rank_is_its_placeholder() -> None:
    loader = WindowLoader(Numbers(5), global_batch_size=4, micro_batch_size=1, rank=3, world_size=4)
    last = [next(iter(window)) for window in loader.epoch(0)][-1]
    assert torch.equal(loader.sample_micro_batch(0, 1)[1], last[1])


def test_a_killed_worker_is_named_by_what_it_loads() -> None:
    class Killed(Numbers):
        def __getitem__(self, index: int) -> Any:  # type: ignore[override]
            os.kill(os.getpid(), signal.SIGKILL)

    options = LoaderOptions(num_workers=1, persistent_workers=True)
    training = WindowLoader(Killed(8), global_batch_size=4, options=options)
    evaluation = EvaluationLoader(Killed(8), batch_size=4, options=options)
    with closing(training), closing(evaluation):
        with pytest.raises(UserError, match=r"loads the training data \(pid \d+\) was killed by SIGKILL"):
            _loaded(training, 0)
        with pytest.raises(UserError, match=r"loads the evaluation data \(pid \d+\) was killed by SIGKILL"):
            list(evaluation)


def test_batches_are_moved_and_cast() -> None:
    options = LoaderOptions(device=torch.device("cpu"), float_dtype=torch.float64)
    numbers, labels = next(iter(next(iter(WindowLoader(Numbers(4), global_batch_size=4, options=options)))))
    assert (numbers.dtype, labels.dtype) == (torch.float64, torch.int64)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 6))
def test_an_evaluation_has_every_sample_once(num_samples: int, batch_size: int, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        loader = EvaluationLoader(Numbers(num_samples), batch_size=batch_size, rank=rank, world_size=world_size)
        batches = [batch[1].tolist() for batch in loader]
        assert all(len(batch) == batch_size for batch in batches[:-1])
        seen += [index for batch in batches for index in batch]
    assert seen == list(range(num_samples))


def test_datasets_without_numbers_are_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    with pytest.raises(UserError, match="Stream, which has no __len__"):
        WindowLoader(Stream(), global_batch_size=1)
    with pytest.raises(UserError, match="is empty"):
        WindowLoader(Numbers(0), global_batch_size=1)
    with pytest.raises(UserError, match="rank=2 is not a rank of world_size=2"):
        WindowLoader(Numbers(4), global_batch_size=2, rank=2, world_size=2)
    with pytest.raises(UserError, match="both rank and world_size"):
        WindowLoader(Numbers(4), global_batch_size=2, rank=0)


def test_a_gpu_is_given_fewer_and_fuller_micro_batches() -> None:
    lengths = [1 + (7 * index) % 40 for index in range(64)]
    sizes = {}
    for device in ("cpu", "cuda"):
        loader = WindowLoader(
            Numbers(64),
            global_batch_size=64,
            micro_batch_size=16,
            lengths=lengths,
            options=LoaderOptions(device=torch.device(device)),
        )
        sizes[device] = loader.cuts.micro_batch_sizes(0, 0)
    assert sum(sizes["cpu"]) == sum(sizes["cuda"]) == 64
    assert len(sizes["cuda"]) <= len(sizes["cpu"]) / 2


@pytest.mark.gpu
def test_copies_hide_behind_what_the_micro_batch_before_computes() -> None:
    class Large(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.full((64, 1024), float(index))

    device = torch.device("cuda", 0)
    options = LoaderOptions(device=device, pin_memory=True)
    loader = WindowLoader(Large(64), global_batch_size=64, micro_batch_size=4, options=options)
    busy = torch.randn(4096, 4096, device=device)

    def run() -> None:
        for values in next(iter(loader)):
            for _ in range(20):  # 40 ms and more, which the host has queued at once
                torch.mm(busy, busy)
            values.sum()

    run()
    share = copies_overlapped(run, device)
    assert isinstance(share, float)
    assert share > 0.7  # the first two of 16 have nothing beside them


@pytest.mark.gpu
@pytest.mark.parametrize("non_blocking", [False, True])
def test_batches_arrive_whole_on_a_gpu(non_blocking: bool) -> None:
    class Large(Numbers):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((256, 1024), float(index)), index

    options = LoaderOptions(device=torch.device("cuda", 0), pin_memory=True, non_blocking=non_blocking)
    loader = WindowLoader(Large(64), global_batch_size=16, micro_batch_size=4, options=options)
    busy = torch.randn(2048, 2048, device="cuda")
    for window in loader:
        for values, labels in window:
            for _ in range(4):
                busy = busy @ busy / 2048
            assert values.is_cuda
            assert torch.equal(values.amin((1, 2)), labels.float())
            assert torch.equal(values.amax((1, 2)), labels.float())


def test_cutting_by_length_keeps_the_windows() -> None:
    lengths = [1 + (7 * index) % 40 for index in range(50)]
    batch: dict[str, Any] = {"global_batch_size": 16, "micro_batch_size": 4, "seed": 3}
    uniform = WindowLoader(Numbers(50), **batch)
    for world_size in (1, 2, 3):
        ranks = [
            WindowLoader(Numbers(50), lengths=lengths, rank=rank, world_size=world_size, **batch)
            for rank in range(world_size)
        ]
        for epoch in (0, 1):
            wanted = [sorted(chain.from_iterable(window)) for window in _loaded(uniform, epoch)]
            found = [_loaded(loader, epoch) for loader in ranks]
            steps = [chain.from_iterable(parts) for parts in zip(*found, strict=True)]
            assert [sorted(chain.from_iterable(window)) for window in steps] == wanted
            longest = 4 * max(lengths)
            for step in (step for rank in found for window in rank for step in window):
                assert len(step) * max(lengths[index] for index in step) <= longest
    assert (
        "1 rank × micro-steps of at most 160 tokens, by length"
        in WindowLoader(Numbers(50), lengths=lengths, **batch).explain()
    )


def test_cuts_that_change_are_the_same_for_loading_ahead() -> None:
    """What a window says of itself is what has been loaded for it, although workers have gone ahead."""
    lengths = [1 + (7 * index) % 40 for index in range(64)]
    options = LoaderOptions(num_workers=2)
    loader = WindowLoader(Numbers(64), global_batch_size=8, micro_batch_size=4, lengths=lengths, options=options)
    with closing(loader):
        for window in loader.epoch(0):
            if window.index == 1:
                loader.cuts.set_costs(CostModel(overhead=1e6), now=1)
            expected = window.sample_indices
            assert [batch[1].tolist() for batch in window] == expected
            assert window.sizes == tuple(map(len, expected))
    loaded = [len(window) for window in loader.epoch(1)]
    assert max(loaded) <= 2, "with so large an overhead, a window is hardly cut"


@pytest.mark.parametrize("lengths", [None, [1 + (7 * index) % 40 for index in range(64)]])
def test_measured_speeds_and_costs_go_on_after_a_resume(lengths: list[int] | None) -> None:
    def loader(world_size: int = 2) -> WindowLoader:
        return WindowLoader(
            Numbers(64), global_batch_size=16, micro_batch_size=4, lengths=lengths, rank=0, world_size=world_size
        )

    one, again, fewer = loader(), loader(), loader(1)
    one.cuts.set_shares((0.75, 0.25), now=-1)
    if lengths is not None:
        one.cuts.set_costs(CostModel(overhead=1e6), now=0)
    state = json.loads(json.dumps(one.state_dict()))
    again.load_state_dict(state)
    assert [window.sizes for window in again.epoch(1)] == [window.sizes for window in one.epoch(1)]
    assert next(one.epoch(0)).sizes != next(one.epoch(1)).sizes
    fewer.load_state_dict(state)
    assert fewer.cuts.shares == (1.0,), "speeds of other ranks say nothing"


def _as_arrays(samples: list[Any]) -> dict[str, np.ndarray]:
    return {"index": np.array([index for _, index in samples])}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_arrays_become_tensors_with_and_without_workers(num_workers: int) -> None:
    options = LoaderOptions(num_workers=num_workers)
    loader = WindowLoader(
        Numbers(8),
        global_batch_size=8,
        micro_batch_size=4,
        collate_fn=_as_arrays,
        rank=0,
        world_size=1,
        options=options,
    )
    with closing(loader):
        (window,) = loader.epoch(0)
        batches = list(next(loader.epoch(1)))
    assert all(isinstance(batch["index"], torch.Tensor) for batch in batches)
    assert window.num_samples == 8


class Sized(Numbers):
    """Samples of so many bytes, which are counted as they are loaded."""

    def __init__(self, num_samples: int, num_bytes: int) -> None:
        super().__init__(num_samples)
        self.num_bytes = num_bytes
        self.loaded: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.loaded.append(index)
        return torch.full((self.num_bytes,), index % 256, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("num_bytes", "options", "together"),
    [
        (1, LoaderOptions(device=torch.device("cpu")), [8, 8, 4]),
        (2**13, LoaderOptions(device=torch.device("cpu")), [4, 4, 4, 4, 4]),  # 2 samples each, 64 KiB together
        (2**20, LoaderOptions(device=torch.device("cpu")), [1] * 20),
        (1, LoaderOptions(device=torch.device("meta")), [1] * 20),  # another device computes meanwhile
    ],
    ids=["tiny", "small", "large", "on another device"],
)
def test_small_micro_batches_are_loaded_together_within_their_window(
    num_bytes: int, options: LoaderOptions, together: list[int]
) -> None:
    dataset = Sized(80, num_bytes)
    loader = WindowLoader(dataset, global_batch_size=40, micro_batch_size=2, options=options)
    for window in loader:
        order = [sample for piece in window.sample_indices for sample in piece]
        seen = []
        dataset.loaded.clear()
        for number, _ in enumerate(window, 1):
            loaded = len(dataset.loaded) // 2
            assert loaded >= number
            if not seen or loaded != seen[-1]:
                seen.append(loaded)
        assert dataset.loaded == order
        assert [after - before for before, after in zip([0, *seen], seen, strict=False)] == together


def test_objects_of_unknown_size_are_loaded_one_by_one() -> None:
    dataset = Sized(40, 1)
    loader = WindowLoader(dataset, global_batch_size=40, micro_batch_size=2, collate_fn=lambda samples: str(samples))
    for number, _ in enumerate(next(iter(loader)), 1):
        assert len(dataset.loaded) == 2 * number


def test_a_window_left_in_the_middle_drops_what_it_has_loaded() -> None:
    loader = WindowLoader(Numbers(80), global_batch_size=40, micro_batch_size=2, seed=3)
    whole = _loaded(loader, 0)
    windows = loader.epoch(0)
    assert next(iter(next(windows)))[1].tolist() == whole[0][0]
    assert [batch[1].tolist() for batch in next(windows)] == whole[1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"num_workers": 2, "prefetch_factor": 0}, "prefetch_factor must be at least 1, got 0"),
        ({"persistent_workers": True}, "persistent_workers=True needs worker processes, and num_workers is 0"),
        ({"prefetch_factor": 4}, "prefetch_factor=4 needs worker processes, and num_workers is 0"),
    ],
)
def test_wrong_options_are_one_message(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LoaderOptions(**wrong)


@pytest.mark.parametrize(
    ("length", "said"),
    [(2.5, "'float' object cannot be interpreted as an integer"), (-3, "__len__.* >= 0")],
)
def test_a_length_that_is_none_is_refused(length: float, said: str) -> None:
    class Odd:
        def __len__(self) -> Any:
            return length

        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(UserError, match=rf"^the length of the training data \(Odd\) can't be taken: {said}\. Its "):
        WindowLoader(Odd(), global_batch_size=2)  # type: ignore[arg-type]
