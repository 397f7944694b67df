"""Pages of steps: what is written is gathered, what is given back is used again, and the limit holds."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from relayrl_client.storage import (
    FALLBACK,
    GREEDY,
    HAS_LOG_PROB,
    HAS_VALUE,
    HAS_VERSION,
    StepLayout,
    StepStorage,
    StepTags,
)
from relayrl_shared.arrow_codec import encode_columns
from relayrl_shared.errors import ConfigError, Overloaded
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.trajectory import RecordSchema

RICH = RecordSchema(
    observation=ObservationSpec.from_gymnasium(
        spaces.Dict(
            {
                "camera": spaces.Box(0, 255, (3, 5), np.uint8),
                "joints": spaces.Box(-1, 1, (3,), np.float64),
                "gear": spaces.Discrete(4),
            }
        )
    ),
    action=ActionSpec.from_gymnasium(
        spaces.Dict({"steer": spaces.Box(-1, 1, (2,), np.float32), "horn": spaces.MultiBinary(3)})
    ),
    masked_leaves=("action.horn",),
    leaf_log_probs=True,
    aux={"lap": "int16"},
)
PLAIN = RecordSchema(
    observation=ObservationSpec.from_gymnasium(spaces.Box(-1, 1, (4,), np.float32)),
    action=ActionSpec.from_gymnasium(spaces.Discrete(2)),
)


def storage(schema: RecordSchema = RICH, *, limit_bytes: int = 1 << 20, steps: int = 8) -> StepStorage:
    return StepStorage(StepLayout(schema), max_segment_steps=steps, limit_bytes=limit_bytes)


def random_values(layout: StepLayout, rows: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Values for each field that a writer gives."""
    random = np.random.default_rng(seed)
    fields = layout.dtype.fields
    assert fields is not None
    values = {}
    for name in layout.values:
        base, shape = fields[name][0].base, fields[name][0].shape
        values[name] = (random.integers(0, 2, (rows, *shape)) * (seed + 1) % 2).astype(base)
        if base.kind == "f":
            values[name] = random.normal(size=(rows, *shape)).astype(base)
    return values


@pytest.mark.parametrize("schema", [RICH, PLAIN], ids=["rich", "plain"])
@pytest.mark.parametrize("actors", [1, 2, 7])
def test_what_is_written_is_gathered(schema: RecordSchema, actors: int) -> None:
    """Every leaf of every dtype comes back bit by bit, for one actor and for many, over several pages."""
    store = storage(schema, steps=5)
    steps = 2 * store.page_steps + 1
    pages = [store.allocate(3) for _ in range(actors)]
    written = []
    for step in range(steps):
        values = random_values(store.layout, actors, step)
        page, row = divmod(step, store.page_steps)
        slots = np.array([mine[page] + row for mine in pages])
        store.write(slots, step, StepTags(step, step + 1, GREEDY if step % 2 else 0), values)
        written.append(values)

    gathered = store.gather([(mine, steps) for mine in pages])
    for actor, columns in enumerate(gathered):
        parts = {**columns.observation, **columns.action}
        parts |= {f"aux.{name}": column for name, column in columns.aux.items()}
        parts |= {name.replace("action", "policy_action"): c for name, c in columns.policy_action.items()}
        parts |= {name.replace("action", "action_mask"): c for name, c in columns.action_mask.items()}
        parts |= {name.replace("action", "leaf_log_prob"): c for name, c in columns.leaf_log_prob.items()}
        parts |= {"behaviour_log_prob": columns.behaviour_log_prob, "value": columns.value}
        for name, column in parts.items():
            expected = np.stack([values[name][actor] for values in written])
            np.testing.assert_array_equal(column, expected)
            assert column.dtype == expected.dtype
        np.testing.assert_array_equal(columns.policy_version, np.arange(steps))
        np.testing.assert_array_equal(columns.learner_update, np.arange(steps) + 1)
        np.testing.assert_array_equal(columns.environment_step, np.arange(steps))
        np.testing.assert_array_equal(columns.greedy, np.arange(steps) % 2 == 1)
        encode_columns(schema, columns)  # complete, and of the dtypes that travel


def test_one_row_is_laid_out_like_many() -> None:
    """The short way of one actor and the long way of many write the same bytes."""
    store = storage()
    values = random_values(store.layout, 3, 4)
    pages = store.allocate(2)
    many, single = np.arange(3) + pages[0], np.arange(3) + pages[1]
    tags = StepTags(3, 2, HAS_VALUE)
    store.write(many, np.array([5, 6, 7]), tags, values)
    for row in range(3):
        store.write(single[row : row + 1], 5 + row, tags, {n: v[row : row + 1] for n, v in values.items()})
    left, right = store.gather([([pages[0]], 3), ([pages[1]], 3)])
    assert encode_columns(RICH, left) == encode_columns(RICH, right)


def test_flags_become_columns() -> None:
    """Each bit is a column of its own."""
    store = storage(PLAIN)
    page = store.allocate(1)
    bits = [GREEDY, FALLBACK, HAS_LOG_PROB, HAS_VALUE, HAS_VERSION]
    for row, bit in enumerate(bits):
        values = random_values(store.layout, 1, row)
        store.write(np.array([page[0] + row]), row, StepTags(1, 1, bit), values)
    (columns,) = store.gather([(page, len(bits))])
    flags = np.stack(
        [
            columns.greedy,
            columns.fallback,
            columns.behaviour_log_prob_valid,
            columns.value_valid,
            columns.policy_version_valid,
        ]
    )
    np.testing.assert_array_equal(flags, np.eye(5, dtype=np.bool_))


def test_rewards_are_written_afterwards() -> None:
    """One reward, one for all, or one each."""
    store = storage(PLAIN)
    (page,) = store.allocate(1)
    slots = np.arange(4) + page
    store.write(slots, 0, StepTags(0, 0, 0), random_values(store.layout, 4, 0))
    store.set_rewards(slots, 1.5)
    store.set_rewards(slots[:2], np.array([2.5, 3.5], np.float32))
    store.set_rewards(slots[3:], np.array([4.5], np.float32))
    (columns,) = store.gather([([page], 4)])
    assert columns.reward.tolist() == [2.5, 3.5, 1.5, 4.5]


def test_gathered_columns_outlive_their_pages() -> None:
    """A closed segment does not change when its pages are written again."""
    store = storage(PLAIN)
    page = store.allocate(1)
    store.write(np.array(page), 0, StepTags(1, 0, 0), random_values(store.layout, 1, 1))
    (columns,) = store.gather([(page, 1)])
    before = encode_columns(PLAIN, columns)
    store.release(page)
    assert store.allocate(1) == page
    store.write(np.array(page), 9, StepTags(2, 5, 31), random_values(store.layout, 1, 2))
    assert encode_columns(PLAIN, columns) == before


def test_the_byte_limit_holds_all_or_none() -> None:
    """Beyond it nothing is allocated, the refusal is counted, and released pages serve again."""
    store = storage(PLAIN, limit_bytes=4000, steps=4)
    total = store.statistics().pages_limit
    pages = store.allocate(total - 1)
    with pytest.raises(Overloaded, match="max_open_segment_bytes"):
        store.allocate(2)
    assert store.statistics().pages_used == total - 1
    assert store.statistics().refused_total == 1
    store.release(pages[:3])
    assert len(set(store.allocate(4)) | set(pages[3:])) == total


def test_a_limit_below_one_page_is_refused() -> None:
    """A setting that could never record a step fails at once."""
    with pytest.raises(ConfigError, match="raise it"):
        storage(PLAIN, limit_bytes=100)


def test_pages_of_images_hold_few_steps() -> None:
    """The page adapts to the size of a step: an image never reserves its maximum length."""
    image = spaces.Box(0, 255, (84, 84, 4), np.uint8)
    schema = RecordSchema(observation=ObservationSpec.from_gymnasium(image), action=PLAIN.action)
    assert storage(schema, limit_bytes=1 << 24, steps=1000).page_steps == 1
    assert storage(PLAIN, steps=1000).page_steps > 100


def test_the_final_observation_of_a_step_is_its_own() -> None:
    """What an actor saw at a step, without the step axis, and the mask by the action leaf's name."""
    store = storage()
    (page,) = store.allocate(1)
    values = random_values(store.layout, 1, 7)
    store.write(np.array([page]), 0, StepTags(0, 0, 0), values)
    final = store.final_observation(page)
    np.testing.assert_array_equal(final.observation["observation.camera"], values["observation.camera"][0])
    np.testing.assert_array_equal(final.action_mask["action.horn"], values["action_mask.horn"][0])
    assert final.observation["observation.gear"].shape == ()


def test_spaces_of_gymnasium_lay_out() -> None:
    """The environments that people begin with are recorded."""
    for name in ("CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1"):
        env = gymnasium.make(name)
        schema = RecordSchema(
            observation=ObservationSpec.from_gymnasium(env.observation_space),
            action=ActionSpec.from_gymnasium(env.action_space),
        )
        store = storage(schema)
        page = store.allocate(1)
        store.write(np.array(page), 0, StepTags(0, 0, 0), random_values(store.layout, 1, 0))
        encode_columns(schema, store.gather([(page, 1)])[0])
