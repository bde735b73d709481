"""The masters of a Redis or Valkey Cluster, and commands split by hash slot.

    redis+cluster://host1:6379,host2:6379/        (rediss+cluster:// for TLS; the hosts are any nodes of the cluster)

Each command has the keys of one user, so of one slot. It is sent to the master that is registered as the owner of the
slot (`app.stores.valkey.slot_owners`). The commands of a call are sent in one write to each master, and their replies
are put together in order. A master that does not answer, a slot whose owner is not registered, and a slot that is being
moved (MOVED, ASK, TRYAGAIN, CLUSTERDOWN) make the cache unavailable for the users concerned, and for no others. No
command is sent again. Instead, all nodes are asked in the background which slots they own (`CLUSTER NODES`), and the
answers are registered. A master that did not answer is not used until it has answered this question.

Invariant: a value is read from a master that has been the registered owner of its slot without interruption. A master
that became a replica and a master again may lack deletions that it had confirmed: it took over the data of the other
master, which may not have received them. Its replication id is another one then. So a read also asks for this id, after
the values.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from app.concurrency.tasks import end
from app.errors import CacheRefused, CacheUnavailable, StoreUnavailable
from app.features.ids import HASH_SLOTS, hash_slot
from app.profiles.ports import Epoch, State
from app.stores.valkey.connections import Connections, Use
from app.stores.valkey.pipelined_connection import Command, Commands, PipelinedConnection, Replies, error_in
from app.stores.valkey.pool import split_cluster_url
from app.stores.valkey.server_registration import ServerRegistration
from app.stores.valkey.slot_owners import Claim, Owner, owners, with_claims
from app.telemetry import Metrics, logger, warn

REFRESH_EVERY_S = 0.5
_REPLICATION: Command = (b"INFO", b"replication")
log = logger("stores.valkey")


class ClusterNode(NamedTuple):
    """A line of `CLUSTER NODES`. `address` is empty if the node that answered does not know it. `flags` has `myself` if
    the line is about this node. `master`: the id of the master of a replica, otherwise `-`. `ranges`: the first and
    last slots that a master owns."""

    node: str
    address: str
    flags: Collection[str]
    master: str
    config_epoch: int
    ranges: Sequence[tuple[int, int]]


def parse_nodes(text: str) -> list[ClusterNode]:
    """Parse the reply to `CLUSTER NODES`."""
    found: list[ClusterNode] = []
    for line in text.splitlines():
        node, address, flags, master, _, _, config_epoch, _, *slots = line.split()
        host, _, port = address.partition("@")[0].rpartition(":")
        known = bool(host) and "noaddr" not in flags and "handshake" not in flags
        address = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}") if known else ""
        # A slot that is being moved is in square brackets.
        ranges = [(int((ends := part.split("-"))[0]), int(ends[-1])) for part in slots if part[0] != "["]
        found.append(ClusterNode(node, address, flags.split(","), master, int(config_epoch), ranges))
    return found


class _Batch(NamedTuple):
    """The commands that a call sends to one master. `places`: the index of each command's user among the users of the
    call, by which replies are put back in order."""

    node: str
    connection: PipelinedConnection
    commands: list[Command]
    places: list[int]


class Cluster:
    """Sends commands to the registered masters of a cluster."""

    def __init__(self, url: str, timeout_s: float, registration: ServerRegistration, metrics: Metrics) -> None:
        """Raises `ValueError` for an invalid URL."""
        self._node_url, seeds = split_cluster_url(url)
        self._timeout_s = timeout_s
        self.registration = registration
        self._metrics = metrics
        self._nodes: dict[str, Connections] = {}  # by address
        self._masters: dict[str, Connections] = {}  # by id: those that answer
        self._seeds = frozenset(seeds)
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self._state: State | None = None
        self._epoch: Epoch = ""
        for address in seeds:
            self._node(address)  # raises `ValueError`
        metrics.cache_available.set(1)

    @property
    def available(self) -> bool:
        """Whether any master answers."""
        return bool(self._masters) or self._asked_at < 0

    async def open(self) -> None:
        """Find the masters, unless this has been tried. Raises `CacheUnavailable` if no node answers."""
        async with self._lock:
            if self._asked_at < 0:
                try:
                    await self._refresh()
                finally:
                    if not self._whole():
                        self._refresh_soon()

    async def send(
        self,
        use: Use,
        user_ids: Sequence[str],
        commands: Commands,
        epoch: Epoch | None = None,
        allowed: tuple[str, ...] = (),
        *,
        proven: bool = False,
    ) -> tuple[Epoch, list[Any]]:
        """Send one command for each of the users. Return the epoch of the cluster and the replies, in the order of the
        users. The reply is a `CacheUnavailable` if the cache is unavailable for the user.

        If `epoch` is given, a command is sent only if the owner of its slot is the same as in `epoch`. `allowed`:
        beginnings of error replies that are returned as they are. `proven`: check after the commands that the masters
        have not been replicas meanwhile; needed for commands that read values.
        """
        if self._asked_at < 0:
            await self.open()
        slots = [hash_slot(user_id) for user_id in user_ids]
        await self._connect({owner.node for owner in set(map(self._owners().__getitem__, slots)) if owner}, use)
        # No await from here to the last `ask`: keys built for a connection must be sent on this connection.
        replies: list[Any] = [None] * len(slots)
        batches = self._batches(slots, use, commands, epoch, replies)
        sent = [(self._ask(batch, proven=proven), batch) for batch in batches]
        current = self._epoch
        for answers, batch in sent:
            for place, reply in zip(batch.places, await self._answers(answers, batch, proven=proven), strict=True):
                replies[place] = reply if type(reply) is list else error_in(reply, allowed) or reply
        if any(isinstance(reply, CacheUnavailable) for reply in replies):
            self._refresh_soon()
        return current, replies

    def slots_without_answer(self, user_ids: Iterable[str]) -> frozenset[int]:
        """The slots of these users, whose commands failed, and all slots of masters that do not answer."""
        failed = {hash_slot(user_id) for user_id in user_ids}
        away = {owner for owner in set(self._owners()) if owner is None or owner.node not in self._masters}
        return frozenset(failed.union(slot for slot, owner in enumerate(self._owners()) if owner in away))

    async def samples(self) -> list[str]:
        """For each registered master, a made-up user id whose slot it owns, for test commands. Raises
        `CacheUnavailable` if a slot has no master."""
        if not self._masters:
            async with self._lock:
                await self._refresh()  # raises the reason why no node answers
        if missing := self._owners().count(None):
            reason = f"{missing} of the cluster's {HASH_SLOTS} slots have no known master"
            raise CacheUnavailable(reason, reason)
        found: dict[str, str] = {}
        masters = {owner.node for owner in set(self._owners()) if owner}
        for number in range(HASH_SLOTS):
            owner = self._owners()[hash_slot(user_id := f"/{number}")]
            if owner and found.setdefault(owner.node, user_id) and len(found) == len(masters):
                break
        return list(found.values())

    async def close(self) -> None:
        if self._refreshing is not None:
            await end([self._refreshing])
        await asyncio.gather(*(connections.close() for connections in self._nodes.values()))

    def _owners(self) -> Sequence[Owner | None]:
        """The registered owner of each slot, as of the last query. Sets `_epoch`, the epoch of the whole cluster."""
        state = self.registration.state.last
        if state is not self._state:
            self._state, self._epoch = state, f"{state.database_id}|{state.server}"
        return owners(self._epoch)

    async def _connect(self, nodes: Iterable[str], use: Use) -> None:
        """Open the connections to these masters that are not open."""
        masters = [(node, self._masters[node]) for node in nodes if node in self._masters]
        closed = [(node, connections) for node, connections in masters if connections.ready(use) is None]
        if closed:
            opened = await asyncio.gather(*(each.get(use) for _, each in closed), return_exceptions=True)
            for (node, _), error in zip(closed, opened, strict=True):
                if isinstance(error, CacheUnavailable):
                    self._failed(node, error)
                elif isinstance(error, BaseException):
                    raise error

    def _batches(
        self, slots: Sequence[int], use: Use, commands: Commands, epoch: Epoch | None, replies: list[Any]
    ) -> list[_Batch]:
        """The commands for each master. `slots` and `replies` have an item for each user. If a user's command cannot be
        sent, the error is put into `replies`."""
        registered = self._owners()
        expected = owners(epoch) if epoch is not None else registered
        groups: dict[Owner | None, list[int]] = defaultdict(list)
        for place, slot in enumerate(slots):
            owner, before = registered[slot], expected[slot]
            if before is owner or (before and owner and before.epoch == owner.epoch):
                groups[owner].append(place)
            else:
                replies[place] = CacheRefused("the owner of the slot was replaced during the request")
        batches: dict[PipelinedConnection, _Batch] = {}
        for owner, places in groups.items():
            connection = self._ready(owner, use)
            if isinstance(connection, CacheUnavailable) or owner is None:
                for place in places:
                    replies[place] = connection
                continue
            batch = batches.setdefault(connection, _Batch(owner.node, connection, [], []))
            batch.commands.extend(commands(owner.epoch, places))
            batch.places.extend(places)
        return list(batches.values())

    def _ready(self, owner: Owner | None, use: Use) -> PipelinedConnection | CacheUnavailable:
        """The open connection to a registered owner, or why there is none."""
        connections = self._masters.get(owner.node) if owner is not None else None
        connection = connections.ready(use) if connections is not None else None
        if connection is None or owner is None:
            return CacheUnavailable("the master of the slot does not answer, or is not known")
        if connection.server != owner.server:
            return CacheRefused("the master was restarted or replaced, and is not registered yet")
        return connection

    def _ask(self, batch: _Batch, *, proven: bool) -> Replies | CacheUnavailable:
        try:
            return batch.connection.ask([*batch.commands, _REPLICATION] if proven else batch.commands)
        except CacheUnavailable as error:
            return error

    async def _answers(self, answers: Replies | CacheUnavailable, batch: _Batch, *, proven: bool) -> list[Any]:
        """The replies to a batch; if it failed, the same error for each command."""
        try:
            if isinstance(answers, CacheUnavailable):
                raise answers
            found = await answers
            if proven and not _is_same_master(batch.connection, found.pop()):
                raise CacheRefused("the node has become a replica and a master again")
        except CacheUnavailable as error:
            self._failed(batch.node, error)
            return [error] * len(batch.places)
        return found

    def _failed(self, node: str, error: CacheUnavailable) -> None:
        """Count an error of a master. If it did not answer, do not use it until it does."""
        refused = isinstance(error, CacheRefused)
        self._metrics.cache_errors.labels("refused" if refused else "silent").inc()
        if not refused and self._masters.pop(node, None) is not None:
            self._metrics.cache_available.set(0)
            log.warning("cluster_master_lost", node=node[:12], error=str(error))
        self._refresh_soon()

    def _whole(self) -> bool:
        """Whether each slot has a registered owner that answers."""
        return not any(isinstance(self._ready(owner, Use.FRONT), CacheUnavailable) for owner in set(self._owners()))

    def _refresh_soon(self) -> None:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh_until_whole())

    async def _refresh_until_whole(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(max(0, self._asked_at + REFRESH_EVERY_S - loop.time()))
            try:
                async with self._lock:
                    await self._refresh()
            except CacheUnavailable as error:
                log.debug("cluster_not_refreshed", error=str(error))
            except Exception:  # a defect must not end the refreshing
                log.exception("cluster_not_refreshed")
            if self._whole():
                return

    async def _refresh(self) -> None:
        """Ask all nodes which slots they own, and register the answers."""
        self._asked_at = asyncio.get_running_loop().time()
        views: dict[str, list[ClusterNode]] = {}
        asked: set[str] = set()
        errors: list[CacheUnavailable] = []
        named = self._seeds.union(self._nodes)
        while new := named - asked:
            asked |= new
            found = await asyncio.gather(*map(self._view, new), return_exceptions=True)
            for address, lines in zip(new, found, strict=True):
                if isinstance(lines, CacheUnavailable):
                    errors.append(lines)
                elif isinstance(lines, BaseException):
                    raise lines
                else:
                    views[address] = lines
            named = named.union(line.address for lines in views.values() for line in lines if line.address)
        claims: list[Claim] = []
        masters: dict[str, Connections] = {}
        for address, lines in views.items():
            own = next(line for line in lines if "myself" in line.flags)
            connection = self._nodes[address].ready(Use.FRONT)
            if "master" in own.flags and connection is not None:
                # A seed may be a load balancer, whose next connection leads to another node.
                if address == own.address or own.node not in masters:
                    masters[own.node] = self._nodes[address]
                claims.append(Claim(own.node, connection.server, own.config_epoch, own.ranges))
        self._masters = masters
        if not views:
            self._metrics.cache_available.set(0)
            raise CacheUnavailable(f"no node of the cluster answers: {errors[0]}", errors[0].public_reason)
        lines = [line for lines in views.values() for line in lines]
        gone = self._nodes.keys() - self._seeds.union(line.address for line in lines)
        await asyncio.gather(*(self._nodes.pop(address).close() for address in gone))
        try:
            await self.registration.revise(lambda state: with_claims(state, claims, {line.node for line in lines}))
        except StoreUnavailable as error:
            warn(log, error)("cache_not_registered", error=str(error))
        self._metrics.cache_available.set(self._whole())

    async def _view(self, address: str) -> list[ClusterNode]:
        """The nodes of the cluster, as the node at this address sees them."""
        connections = self._node(address)
        while True:
            connection = await connections.get()
            info, reply = await connection.ask([_REPLICATION, (b"CLUSTER", b"NODES")])
            if (error := error_in(reply)) is not None:
                raise error
            if _is_same_master(connection, info):
                return parse_nodes(reply.decode())

    def _node(self, address: str) -> Connections:
        if address not in self._nodes:
            self._nodes[address] = Connections(self._node_url(address), self._timeout_s, in_cluster=True)
        return self._nodes[address]


def _is_same_master(connection: PipelinedConnection, info: object) -> bool:
    """Whether INFO shows the replication id that the node had when the connection was opened. If not, the connection is
    closed, so that the next one has the new identity."""
    replication_id = connection.server.rpartition(":")[2].encode()
    if isinstance(info, bytes) and b"master_replid:" + replication_id in info:
        return True
    connection.close("the node has become a replica and a master again")
    return False
