"""The registered owners of a cluster's slots: generations rise slot by slot, and a lower config epoch does not win."""

import json

from app.features.ids import HASH_SLOTS, hash_slot
from app.profiles.ports import EVERY_SLOT, State
from app.stores.valkey.registration import ClusterNode, owners, parse_nodes, replaced_slots, with_claims

LAST = HASH_SLOTS - 1


def claim(node: str, server: str, config_epoch: int, ranges: list[tuple[int, int]]) -> ClusterNode:
    return ClusterNode(node, "", ["master"], "-", config_epoch, ranges, server)


ONE, TWO = claim("one", "one-run", 1, [(0, 99)]), claim("two", "two-run", 2, [(100, LAST)])
KNOWN = {"one", "two"}


def registered(*claims: ClusterNode, state: State | None = None, known: set[str] = KNOWN) -> State:
    state = state or State()
    return state._replace(server=with_claims(state, claims, known), generation=state.generation + 1)


def ranges(state: State) -> list[list[object]]:
    found: list[list[object]] = json.loads(state.server or "")
    return found


FIRST = registered(ONE, TWO)


def test_masters_are_registered_with_their_slots() -> None:
    assert ranges(FIRST) == [[0, 99, "one", "one-run", 1, 1], [100, LAST, "two", "two-run", 2, 1]]
    assert registered(ONE, TWO, state=FIRST).server == FIRST.server


def test_slots_that_no_master_claims_have_no_owner() -> None:
    found = owners(f"id|{registered(ONE).server}")
    assert found[99] is not None
    assert found[100] is None


def test_generation_rises_only_for_slots_with_another_owner() -> None:
    moved = registered(ONE._replace(config_epoch=3, ranges=[(0, 149)]), TWO, state=FIRST)
    assert ranges(moved) == [
        [0, 99, "one", "one-run", 3, 1],
        [100, 149, "one", "one-run", 3, 2],
        [150, LAST, "two", "two-run", 2, 1],
    ]
    back = registered(TWO._replace(config_epoch=4), state=moved)
    assert [row[-1] for row in ranges(back)] == [1, 3, 1]
    epochs = [owners(f"id|{state.server}")[120] for state in (FIRST, moved, back)]
    assert len({owner.epoch for owner in epochs if owner}) == 3


def test_master_that_was_restarted_is_another_owner() -> None:
    assert ranges(registered(ONE._replace(server="new-run"), state=FIRST))[0] == [0, 99, "one", "new-run", 1, 2]


def test_lower_config_epoch_is_never_registered() -> None:
    for claim in (ONE._replace(ranges=[(0, LAST)]), TWO._replace(server="old-run", config_epoch=1)):
        assert ranges(registered(claim, state=FIRST)) == ranges(FIRST)
    equal = ONE._replace(config_epoch=2, ranges=[(0, LAST)])
    assert ranges(registered(equal, state=FIRST))[1:] == ranges(FIRST)[1:]


def test_highest_config_epoch_is_registered_when_two_masters_claim_a_slot() -> None:
    new = claim("three", "three-run", 9, [(0, 99)])
    for claims in ([new, ONE, TWO], [ONE, TWO, new]):
        assert ranges(registered(*claims, state=FIRST, known={*KNOWN, "three"}))[0][2] == "three"


def test_new_cluster_is_registered_when_it_does_not_know_the_owner() -> None:
    other = claim("other", "other-run", 1, [(0, LAST)])
    assert ranges(registered(other, state=FIRST, known={"other"})) == [[0, LAST, "other", "other-run", 1, 2]]


def test_generations_do_not_repeat_when_the_registration_was_of_one_server() -> None:
    single = FIRST._replace(server="a" * 40, generation=7)
    assert {row[-1] for row in ranges(registered(ONE, TWO, state=single))} == {8}


def test_hash_slot_is_that_of_the_cluster_specification() -> None:
    assert hash_slot("123456789") == 0x31C3


def test_nodes_are_parsed() -> None:
    mine, other, replica, lost = parse_nodes(
        "a :7000@17000 myself,master - 0 0 3 connected 0-5 9 [12->-b]\n"
        "b ::1:7001@17001,host.example master - 0 1 2 connected 10-16383\n"
        "c 10.0.0.3:7002@17002 slave,fail? b 0 1 2 disconnected\n"
        "d :0@0 master,noaddr - 0 1 1 disconnected\n"
    )
    assert (mine.address, list(mine.ranges), mine.config_epoch) == ("", [(0, 5), (9, 9)], 3)
    assert (other.address, other.master) == ("[::1]:7001", "-")
    assert (replica.address, replica.master, replica.flags) == ("10.0.0.3:7002", "b", ["slave", "fail?"])
    assert lost.address == ""


def test_only_slots_with_another_owner_are_replaced() -> None:
    moved = registered(ONE._replace(config_epoch=3, ranges=[(0, 149)]), TWO, state=FIRST)
    assert replaced_slots(FIRST, moved) == frozenset(range(100, 150))
    assert replaced_slots(FIRST, FIRST) == frozenset()
    for other in (FIRST._replace(database_id="restored"), FIRST._replace(server="a" * 40)):
        assert replaced_slots(FIRST, other) == {EVERY_SLOT}
