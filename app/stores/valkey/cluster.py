"""The masters of a Redis or Valkey Cluster, and commands split by hash slot.

Each command has the keys of one user, so of one slot. It is sent to the master that is registered as the owner of the
slot (`app.stores.valkey.registration`). The commands of a call are sent in one write to each master, and their replies
are put together in order. A master that does not answer, a slot whose owner is not registered, and a slot that is being
moved (MOVED, ASK, TRYAGAIN, CLUSTERDOWN) make the cache unavailable for the users of that master or slot only. No
command is sent again. Instead, all nodes are asked in the background which slots they own (`CLUSTER NODES`), and the
answers are registered. A master that did not answer is not used until it has answered this question.

Invariant: a value is read from a master that has been the registered owner of its slot without interruption. A master
that became a replica and a master again may lack deletions that it had confirmed: it took over the data of the other
master, which may not have received them. Its replication id has then changed. So each read also asks for this id, after
the values.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from app.concurrency.tasks import end
from app.errors import CacheRefused, CacheUnavailable
from app.features.ids import HASH_SLOTS, hash_slot
from app.profiles.ports import Epoch, State
from app.stores.valkey.connections import Command, Commands, Connections, PipelinedConnection, Use, error_in
from app.stores.valkey.pool import split_cluster_url
from app.stores.valkey.registration import ClusterNode, Owner, ServerRegistration, owners, parse_nodes, with_claims
from app.telemetry import Metrics, logger

REFRESH_EVERY_S = 0.5
_REPLICATION: Command = (b"INFO", b"replication")
# By connection: the id of the master, the commands for it, and the index of each command's user in the call.
Batches = dict[PipelinedConnection, tuple[str, list[Command], list[int]]]
log = logger("stores.valkey")


class Cluster:
    """Sends commands to the registered masters of a cluster."""

    def __init__(self, url: str, timeout_s: float, registration: ServerRegistration, metrics: Metrics) -> None:
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
        """Find the masters, on the first call only. Raises `CacheUnavailable` if no node answers."""
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
        users. The reply is a `CacheUnavailable` if the cache is unavailable for the user. If `epoch` is given, a
        command is sent only if its slot has the same owner as in `epoch`. Error replies that begin with one of
        `allowed` are returned as they are. Commands that read values need `proven`: it replaces the replies of a master
        by a `CacheRefused` if the master was a replica at any time after its connection was opened."""
        if self._asked_at < 0:
            await self.open()
        slots = [hash_slot(user_id) for user_id in user_ids]
        nodes = {owner.node for owner in set(map(self._owners().__getitem__, slots)) if owner}
        masters = [(node, self._masters[node]) for node in nodes if node in self._masters]
        if closed := [(node, connections) for node, connections in masters if connections.ready(use) is None]:
            await asyncio.gather(*(self._connect(node, connections, use) for node, connections in closed))
        # No await from here to the last `ask`: keys built for a connection must be sent on this connection.
        replies: list[Any] = [None] * len(slots)
        batches = self._batches(slots, use, commands, epoch, replies)
        more = [_REPLICATION] if proven else []
        sent = [connection.ask(batch + more) for connection, (_, batch, _) in batches.items()]
        current = self._epoch
        for answers, (connection, (node, _, places)) in zip(sent, batches.items(), strict=True):
            try:
                found = await answers
                if proven and not _is_same_master(connection, found.pop()):
                    raise CacheRefused("the node has become a replica and a master again")
            except CacheUnavailable as error:
                self._failed(node, error)
                found = [error] * len(places)
            for place, reply in zip(places, found, strict=True):
                replies[place] = reply if type(reply) is list else error_in(reply, allowed) or reply
        if any(isinstance(reply, CacheUnavailable) for reply in replies):
            self._refresh_soon()
        return current, replies

    def slots_without_answer(self, user_ids: Iterable[str]) -> frozenset[int]:
        """The slots of these users, whose commands have failed, and all slots without a master that answers."""
        failed = {hash_slot(user_id) for user_id in user_ids}
        away = {owner for owner in set(self._owners()) if owner is None or owner.node not in self._masters}
        return frozenset(failed.union(slot for slot, owner in enumerate(self._owners()) if owner in away))

    async def samples(self) -> list[str]:
        """For each registered master, a user id of one of its slots. Raises `CacheUnavailable` if a slot has none."""
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
        await end([self._refreshing] if self._refreshing is not None else [])
        await asyncio.gather(*(connections.close() for connections in self._nodes.values()))

    def _owners(self) -> Sequence[Owner | None]:
        """The registered owner of each slot, as of the last query. Sets `_epoch`, the epoch of the whole cluster."""
        state = self.registration.state.last
        if state is not self._state:
            self._state, self._epoch = state, f"{state.database_id}|{state.server}"
        return owners(self._epoch)

    async def _connect(self, node: str, connections: Connections, use: Use) -> None:
        try:
            await connections.get(use)
        except CacheUnavailable as error:
            self._failed(node, error)

    def _batches(
        self, slots: Sequence[int], use: Use, commands: Commands, epoch: Epoch | None, replies: list[Any]
    ) -> Batches:
        """The commands for each master. If the command of a user cannot be sent, the error is put into `replies`."""
        registered = self._owners()
        expected = owners(epoch) if epoch is not None else registered
        groups: dict[Owner | None, list[int]] = defaultdict(list)
        for place, slot in enumerate(slots):
            owner, before = registered[slot], expected[slot]
            if before is owner or (before and owner and before.epoch == owner.epoch):
                groups[owner].append(place)
            else:
                replies[place] = CacheRefused("the owner of the slot was replaced during the request")
        batches: Batches = {}
        for owner, places in groups.items():
            connection = self._ready(owner, use)
            if isinstance(connection, CacheUnavailable) or owner is None:
                for place in places:
                    replies[place] = connection
                continue
            _, batch, places_of_batch = batches.setdefault(connection, (owner.node, [], []))
            batch.extend(commands(owner.epoch, places))
            places_of_batch.extend(places)
        return batches

    def _ready(self, owner: Owner | None, use: Use) -> PipelinedConnection | CacheUnavailable:
        connections = self._masters.get(owner.node) if owner is not None else None
        connection = connections.ready(use) if connections is not None else None
        if connection is None or owner is None:
            return CacheUnavailable("the master of the slot does not answer, or is not known")
        if connection.server != owner.server:
            return CacheRefused("the master was restarted or replaced, and is not registered yet")
        return connection

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
        return not any(isinstance(self._ready(owner, "front"), CacheUnavailable) for owner in set(self._owners()))

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
        self._asked_at = asyncio.get_running_loop().time()
        answers: dict[str, list[ClusterNode] | CacheUnavailable] = {}
        views: dict[str, list[ClusterNode]] = {}
        named = self._seeds.union(self._nodes)
        while new := named - answers.keys():
            answers.update(zip(new, await asyncio.gather(*map(self._view, new)), strict=True))
            views = {address: answer for address, answer in answers.items() if isinstance(answer, list)}
            named = named.union(line.address for lines in views.values() for line in lines if line.address)
        claims: list[ClusterNode] = []
        masters: dict[str, Connections] = {}
        for address, lines in views.items():
            own = next(line for line in lines if "myself" in line.flags)
            connection = self._nodes[address].ready("front")
            if "master" in own.flags and connection is not None:
                # A seed may be a load balancer, whose next connection leads to another node.
                if address == own.address or own.node not in masters:
                    masters[own.node] = self._nodes[address]
                claims.append(own._replace(server=connection.server))
        self._masters = masters
        if not views:
            self._metrics.cache_available.set(0)
            error = next(answer for answer in answers.values() if isinstance(answer, CacheUnavailable))
            raise CacheUnavailable(f"no node of the cluster answers: {error}", error.public_reason)
        lines = [line for lines in views.values() for line in lines]
        gone = self._nodes.keys() - self._seeds.union(line.address for line in lines)
        await asyncio.gather(*(self._nodes.pop(address).close() for address in gone))
        await self.registration.try_to_revise(lambda state: with_claims(state, claims, {line.node for line in lines}))
        self._metrics.cache_available.set(self._whole())

    async def _view(self, address: str) -> list[ClusterNode] | CacheUnavailable:
        """The nodes of the cluster, as the node at this address sees them; or why it does not answer."""
        connections = self._node(address)
        try:
            while True:
                connection = await connections.get()
                info, reply = await connection.ask([_REPLICATION, (b"CLUSTER", b"NODES")])
                if (refusal := error_in(reply)) is not None:
                    return refusal
                if _is_same_master(connection, info):
                    return parse_nodes(reply.decode())
        except CacheUnavailable as error:
            return error

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
