"""The ZMQ sockets of the data plane (contracts C5); every service and the client talk through these.

`Peer` asks (DEALER), `RouterServer` answers (ROUTER), `Announcer` and `AnnouncementListener` spread hints
(PUB, SUB). What the bytes mean is in `frames` and `messages`; here is only how they travel: heartbeats,
reconnection, deadlines, bounded queues and counters.
"""

from __future__ import annotations

from relayrl_shared._announce import AnnouncementListener, Announcer
from relayrl_shared._peer import OnReply, Peer, PeerStatistics
from relayrl_shared._router import Incoming, Rejected, RouterServer, RouterStatistics, error_reply
from relayrl_shared._zmq import DEFAULT_MAX_MESSAGE_BYTES

__all__ = [
    "DEFAULT_MAX_MESSAGE_BYTES",
    "AnnouncementListener",
    "Announcer",
    "Incoming",
    "OnReply",
    "Peer",
    "PeerStatistics",
    "Rejected",
    "RouterServer",
    "RouterStatistics",
    "error_reply",
]
