"""The bytes of protocol 1: what stands here is what docs/wire-protocol.md promises to other languages."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from relayrl_shared import frames, messages
from relayrl_shared.messages import AnyMessage, LeafHeader
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.trajectory import TrajectoryMetadata

METADATA = TrajectoryMetadata(
    trajectory_id="t",
    run_id="r",
    policy="p",
    client_id="c",
    client_index=2,
    spool_id="s",
    sequence=9,
    actor_id="a",
    actor_index=1,
    episode_id="e",
    episode_index=3,
    segment_index=0,
    first_step_index=0,
    steps=5,
    rollout_index=4,
    rollout_segments=1,
    environment_instance_id="i",
    environment_episode_id="j",
    terminated=True,
    truncated=False,
    episode_return=1.5,
    started_at=1.0,
    ended_at=2.0,
    schema_digest="d",
    body_digest="b",
)

OBSERVATION_SPEC = ObservationSpec(
    leaves=(LeafSpec(name="observation", kind="box", shape=(2,), dtype="float32", low=(-1.0,), high=(1.0,)),)
)
ACTION_SPEC = ActionSpec(
    leaves=(LeafSpec(name="action", kind="discrete", shape=(), dtype="int64", nvec=(3,), start=(0,)),)
)

GOLDEN: list[tuple[AnyMessage, tuple[bytes, ...], list[str]]] = []
"""(message, payload, hex of every frame)"""


def _golden(message: AnyMessage, payload: tuple[bytes, ...], *hex_frames: str) -> None:
    GOLDEN.append((message, payload, list(hex_frames)))


_golden(
    messages.ErrorReply(
        request_id=7, code="overloaded", message="busy", retryable=True, retry_after_seconds=0.5
    ),
    (),
    "88a46b696e64a56572726f72a776657273696f6e01aa726571756573745f696407ab7472616365706172656e74c0a463"
    "6f6465aa6f7665726c6f61646564a76d657373616765a462757379a9726574727961626c65c3b372657472795f616674"
    "65725f7365636f6e6473cb3fe0000000000000",
)
_golden(
    messages.Hello(
        request_id=1,
        client_id="c",
        run=messages.RunRequest(
            name="r",
            algorithm="PPO",
            hyperparameters={"gamma": 0.99},
            observation_spec=OBSERVATION_SPEC,
            action_spec=ACTION_SPEC,
        ),
        actors=(messages.ActorInfo(actor_id="a", actor_index=0, environment_instance_id="i"),),
        spools=(
            messages.SpoolReport(
                spool_id="s", run_id="r", highest_accepted=4, oldest_unacknowledged=3, dropped=((1, 2),)
            ),
        ),
    ),
    (),
    "88a46b696e64a568656c6c6fa776657273696f6e01aa726571756573745f696401ab7472616365706172656e74c0a963"
    "6c69656e745f6964a163a372756e8aa46e616d65a172a9616c676f726974686da350504faf6879706572706172616d65"
    "7465727381a567616d6d61cb3fefae147ae147aeb06f62736572766174696f6e5f7370656381a66c65617665739189a4"
    "6e616d65ab6f62736572766174696f6ea46b696e64a3626f78a573686170659102a56474797065a7666c6f61743332a4"
    "7061746890a36c6f7791cbbff0000000000000a46869676891cb3ff0000000000000a46e76656390a5737461727490ab"
    "616374696f6e5f7370656381a66c65617665739189a46e616d65a6616374696f6ea46b696e64a86469736372657465a5"
    "736861706590a56474797065a5696e743634a47061746890a36c6f77c0a468696768c0a46e7665639103a57374617274"
    "9100ad6d61736b65645f6c656176657390a6706163696e67c0ae6d61785f706f6c6963795f6c6167c0a473656564c0a9"
    "616c6c6f775f6e616ec0a66163746f72739184a86163746f725f6964a161ab6163746f725f696e64657800a86167656e"
    "745f6964c0b7656e7669726f6e6d656e745f696e7374616e63655f6964a169a673706f6f6c739185a873706f6f6c5f69"
    "64a173a672756e5f6964a172b0686967686573745f616363657074656404b56f6c646573745f756e61636b6e6f776c65"
    "6467656403a764726f7070656491920102",
)
_golden(
    messages.Welcome(
        request_id=1,
        run_id="r",
        run_name="n",
        policy="n",
        client_index=0,
        algorithm="PPO",
        hyperparameters={"gamma": 0.99},
        pacing="block",
        max_policy_lag=1,
        rollout_steps=128,
        max_segment_steps=1000,
        first_rollout_index=0,
        learner_update=0,
        seed=1,
        allow_nan=False,
        limits=messages.Limits(max_message_bytes=67108864, max_in_flight=64, heartbeat_seconds=2.0),
    ),
    (),
    "de0013a46b696e64a777656c636f6d65a776657273696f6e01aa726571756573745f696401ab7472616365706172656e"
    "74c0a672756e5f6964a172a872756e5f6e616d65a16ea6706f6c696379a16eac636c69656e745f696e64657800a9616c"
    "676f726974686da350504faf6879706572706172616d657465727381a567616d6d61cb3fefae147ae147aea670616369"
    "6e67a5626c6f636bae6d61785f706f6c6963795f6c616701ad726f6c6c6f75745f7374657073cc80b16d61785f736567"
    "6d656e745f7374657073cd03e8b366697273745f726f6c6c6f75745f696e64657800ae6c6561726e65725f7570646174"
    "6500a47365656401a9616c6c6f775f6e616ec2a66c696d69747383b16d61785f6d6573736167655f6279746573ce0400"
    "0000ad6d61785f696e5f666c6967687440b16865617274626561745f7365636f6e6473cb4000000000000000",
)
_golden(
    messages.Heartbeat(
        request_id=2,
        client_id="c",
        run_id="r",
        policy_versions={"n": 3},
        lease_steps_wanted=10,
        lease_steps_used=5,
    ),
    (),
    "8aa46b696e64a9686561727462656174a776657273696f6e01aa726571756573745f696402ab7472616365706172656e"
    "74c0a9636c69656e745f6964a163a672756e5f6964a172a673706f6f6c7390af706f6c6963795f76657273696f6e7381"
    "a16e03b26c656173655f73746570735f77616e7465640ab06c656173655f73746570735f7573656405",
)
_golden(
    messages.HeartbeatReply(
        request_id=2,
        known=True,
        learner_update=3,
        run_state="active",
        lease_steps=10,
        lease_expires_in_seconds=5.0,
    ),
    (),
    "89a46b696e64af6865617274626561745f7265706c79a776657273696f6e01aa726571756573745f696402ab74726163"
    "65706172656e74c0a56b6e6f776ec3ae6c6561726e65725f75706461746503a972756e5f7374617465a6616374697665"
    "ab6c656173655f73746570730ab86c656173655f657870697265735f696e5f7365636f6e6473cb4014000000000000",
)
_golden(
    messages.ActorChange(
        request_id=3,
        client_id="c",
        run_id="r",
        added=(
            messages.ActorInfo(actor_id="b", actor_index=1, agent_id="left", environment_instance_id="i"),
        ),
        removed=("a",),
    ),
    (),
    "88a46b696e64ac6163746f725f6368616e6765a776657273696f6e01aa726571756573745f696403ab74726163657061"
    "72656e74c0a9636c69656e745f6964a163a672756e5f6964a172a561646465649184a86163746f725f6964a162ab6163"
    "746f725f696e64657801a86167656e745f6964a46c656674b7656e7669726f6e6d656e745f696e7374616e63655f6964"
    "a169a772656d6f76656491a161",
)
_golden(
    messages.Goodbye(request_id=4, client_id="c", run_id="r"),
    (),
    "87a46b696e64a7676f6f64627965a776657273696f6e01aa726571756573745f696404ab7472616365706172656e74c0"
    "a9636c69656e745f6964a163a672756e5f6964a172a673706f6f6c7390",
)
_golden(
    messages.Ok(request_id=4),
    (),
    "84a46b696e64a26f6ba776657273696f6e01aa726571756573745f696404ab7472616365706172656e74c0",
)
_golden(
    messages.PutTrajectory(
        request_id=5,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        trajectory=METADATA,
    ),
    (b"body", b""),
    "85a46b696e64ae7075745f7472616a6563746f7279a776657273696f6e01aa726571756573745f696405ab7472616365"
    "706172656e74d93730302d30616637363531393136636434336464383434386562323131633830333139632d62376164"
    "3662373136393230333333312d3031aa7472616a6563746f7279de001dad7472616a6563746f72795f6964a174a67275"
    "6e5f6964a172a6706f6c696379a170a9636c69656e745f6964a163ac636c69656e745f696e64657802a873706f6f6c5f"
    "6964a173a873657175656e636509a86163746f725f6964a161ab6163746f725f696e64657801a86167656e745f6964c0"
    "aa657069736f64655f6964a165ad657069736f64655f696e64657803ad7365676d656e745f696e64657800b066697273"
    "745f737465705f696e64657800a5737465707305ad726f6c6c6f75745f696e64657804b0726f6c6c6f75745f7365676d"
    "656e747301b7656e7669726f6e6d656e745f696e7374616e63655f6964a169b6656e7669726f6e6d656e745f65706973"
    "6f64655f6964a16aa7707572706f7365a5747261696eaa7465726d696e61746564c3a97472756e6361746564c2ae6570"
    "69736f64655f72657475726ecb3ff8000000000000aa737461727465645f6174cb3ff0000000000000a8656e6465645f"
    "6174cb4000000000000000a473656564c0ad736368656d615f646967657374a164ab626f64795f646967657374a162ab"
    "7472616365706172656e74c0",
    "626f6479",
    "",
)
_golden(
    messages.PutSchema(request_id=6, digest="d"),
    (b"schema",),
    "85a46b696e64aa7075745f736368656d61a776657273696f6e01aa726571756573745f696406ab747261636570617265"
    "6e74c0a6646967657374a164",
    "736368656d61",
)
_golden(
    messages.Ack(request_id=5, spool_id="s", run_id="r", sequence=9),
    (),
    "87a46b696e64a361636ba776657273696f6e01aa726571756573745f696405ab7472616365706172656e74c0a873706f"
    "6f6c5f6964a173a672756e5f6964a172a873657175656e636509",
)
_golden(
    messages.Nack(
        request_id=5,
        spool_id="s",
        run_id="r",
        sequence=9,
        reason="unknown_schema",
        retryable=True,
        retry_after_seconds=0.0,
    ),
    (),
    "8ba46b696e64a46e61636ba776657273696f6e01aa726571756573745f696405ab7472616365706172656e74c0a87370"
    "6f6f6c5f6964a173a672756e5f6964a172a873657175656e636509a6726561736f6eae756e6b6e6f776e5f736368656d"
    "61a664657461696ca0a9726574727961626c65c3b372657472795f61667465725f7365636f6e6473cb00000000000000"
    "00",
)
_golden(
    messages.OpenIntent(request_id=8, policy="p", digests=("aa", "bb")),
    (),
    "86a46b696e64ab6f70656e5f696e74656e74a776657273696f6e01aa726571756573745f696408ab7472616365706172"
    "656e74c0a6706f6c696379a170a76469676573747392a26161a26262",
)
_golden(
    messages.Intent(request_id=8, intent_id="i", missing=("bb",)),
    (),
    "86a46b696e64a6696e74656e74a776657273696f6e01aa726571756573745f696408ab7472616365706172656e74c0a9"
    "696e74656e745f6964a169a76d697373696e6791a26262",
)
_golden(
    messages.PutBlob(request_id=9, digest="bb", offset=0, total_bytes=3),
    (b"xyz",),
    "87a46b696e64a87075745f626c6f62a776657273696f6e01aa726571756573745f696409ab7472616365706172656e74"
    "c0a6646967657374a26262a66f666673657400ab746f74616c5f627974657303",
    "78797a",
)
_golden(
    messages.Publish(
        request_id=10,
        intent_id="i",
        policy="p",
        run_id="r",
        lineage_id="l",
        learner_update=4,
        fencing_token=1,
    ),
    (b"{}",),
    "8aa46b696e64a77075626c697368a776657273696f6e01aa726571756573745f69640aab7472616365706172656e74c0"
    "a9696e74656e745f6964a169a6706f6c696379a170a672756e5f6964a172aa6c696e656167655f6964a16cae6c656172"
    "6e65725f75706461746504ad66656e63696e675f746f6b656e01",
    "7b7d",
)
_golden(
    messages.Published(request_id=10, policy="p", policy_version=5),
    (),
    "86a46b696e64a97075626c6973686564a776657273696f6e01aa726571756573745f69640aab7472616365706172656e"
    "74c0a6706f6c696379a170ae706f6c6963795f76657273696f6e05",
)
_golden(
    messages.FetchManifest(request_id=11, policy="p"),
    (),
    "87a46b696e64ae66657463685f6d616e6966657374a776657273696f6e01aa726571756573745f69640bab7472616365"
    "706172656e74c0a6706f6c696379a170ae706f6c6963795f76657273696f6ec0a5616c696173a66c6174657374",
)
_golden(
    messages.ManifestReply(request_id=11, policy="p", policy_version=5),
    (b"{}",),
    "86a46b696e64ae6d616e69666573745f7265706c79a776657273696f6e01aa726571756573745f69640bab7472616365"
    "706172656e74c0a6706f6c696379a170ae706f6c6963795f76657273696f6e05",
    "7b7d",
)
_golden(
    messages.FetchBlob(request_id=12, digest="bb", offset=1),
    (),
    "86a46b696e64aa66657463685f626c6f62a776657273696f6e01aa726571756573745f69640cab747261636570617265"
    "6e74c0a6646967657374a26262a66f666673657401",
)
_golden(
    messages.BlobChunk(request_id=12, digest="bb", offset=1, total_bytes=3),
    (b"yz",),
    "87a46b696e64aa626c6f625f6368756e6ba776657273696f6e01aa726571756573745f69640cab747261636570617265"
    "6e74c0a6646967657374a26262a66f666673657401ab746f74616c5f627974657303",
    "797a",
)
_golden(
    messages.Announcement(policy="p", policy_version=5, alias="latest", learner_update=4),
    (),
    "88a46b696e64ac616e6e6f756e63656d656e74a776657273696f6e01aa726571756573745f696400ab74726163657061"
    "72656e74c0a6706f6c696379a170ae706f6c6963795f76657273696f6e05a5616c696173a66c6174657374ae6c656172"
    "6e65725f75706461746504",
)
_golden(
    messages.RequestActions(
        request_id=13, policy="p", rows=1, leaves=(LeafHeader("observation", "float32", (1, 2)),)
    ),
    (bytes(8),),
    "8ba46b696e64af726571756573745f616374696f6e73a776657273696f6e01aa726571756573745f69640dab74726163"
    "65706172656e74c0a6706f6c696379a170a4726f777301a66c65617665739193ab6f62736572766174696f6ea7666c6f"
    "61743332920102ae706f6c6963795f76657273696f6ec0a5616c696173a66c6174657374af74696d656f75745f736563"
    "6f6e6473cb4014000000000000a87072696f7269747900",
    "0000000000000000",
)
_golden(
    messages.Actions(
        request_id=13,
        policy="p",
        policy_version=5,
        learner_update=4,
        rows=1,
        leaves=(LeafHeader("action", "int64", (1,)),),
    ),
    (bytes(8),),
    "89a46b696e64a7616374696f6e73a776657273696f6e01aa726571756573745f69640dab7472616365706172656e74c0"
    "a6706f6c696379a170ae706f6c6963795f76657273696f6e05ae6c6561726e65725f75706461746504a4726f777301a6"
    "6c65617665739193a6616374696f6ea5696e7436349101",
    "0000000000000000",
)


@pytest.mark.parametrize(
    ("message", "payload", "hex_frames"), GOLDEN, ids=[type(entry[0]).__name__ for entry in GOLDEN]
)
def test_a_message_encodes_to_its_golden_bytes(
    message: AnyMessage, payload: tuple[bytes, ...], hex_frames: list[str]
) -> None:
    """Every kind of message has exactly the bytes that the specification fixes."""
    encoded = frames.encode(message, payload)

    assert hex_frames == [bytes(frame).hex() for frame in encoded]


@pytest.mark.parametrize(
    ("message", "payload", "hex_frames"), GOLDEN, ids=[type(entry[0]).__name__ for entry in GOLDEN]
)
def test_golden_bytes_decode_to_the_message(
    message: AnyMessage, payload: tuple[bytes, ...], hex_frames: list[str]
) -> None:
    """The golden bytes read back as the message that they were made of."""
    decoded, decoded_payload = frames.decode([bytes.fromhex(frame) for frame in hex_frames])

    assert message == decoded
    assert list(payload) == [bytes(frame) for frame in decoded_payload]


def test_every_kind_has_golden_bytes() -> None:
    """No kind of message can be added without its bytes being pinned here."""
    pinned = {type(message) for message, _, _ in GOLDEN}

    assert set(AnyMessage.__args__) == pinned


def test_fields_that_are_missing_take_their_defaults_and_unknown_ones_are_passed_over() -> None:
    """A sender may leave out optional fields and a later one may add fields: the wire can grow."""
    header = msgspec.msgpack.encode({"kind": "ack", "spool_id": "s", "run_id": "r", "sequence": 1, "new": 2})

    message, _ = frames.decode([header])

    assert messages.Ack(spool_id="s", run_id="r", sequence=1) == message


def test_packed_leaves_have_their_golden_bytes() -> None:
    """Leaves are little-endian, in C order, each padded with zeros to a multiple of eight bytes."""
    leaves = {
        "observation": np.array([[1.0, -2.0, 0.5]], dtype=np.float32),
        "action_mask": np.array([[True, False, True]]),
        "count": np.array(7, dtype=np.int64),
    }

    headers, frame = frames.pack_leaves(leaves)

    assert (
        LeafHeader("observation", "float32", (1, 3)),
        LeafHeader("action_mask", "bool", (1, 3)),
        LeafHeader("count", "int64", ()),
    ) == headers
    assert frame.hex() == ("0000803f000000c00000003f0000000001000100000000000700000000000000")
