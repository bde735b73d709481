"""The estimates equal those of the Open Bandit Pipeline on its published sample.

Y. Saito, S. Aihara, M. Matsutani, Y. Narita: Open Bandit Dataset and Pipeline, NeurIPS 2021 (data under CC BY 4.0). Its
package `obp` 0.4.1 needs an older Python, so its figures are here as numbers. They were made by a script that loads
`obp/ope/estimators.py` of the wheel and calls `InverseProbabilityWeighting`,
`SelfNormalizedInverseProbabilityWeighting` and `DoublyRobust` (`estimate_policy_value`) with these data:

- the log: of `obp/dataset/obd/bts/men/men.csv`, in the order of the file, those with a click and each hundredth one;
- the evaluated policy: item a of the 34 items has a probability proportional to 1 + a mod 5, in every position;
- the reward model: (clicks + 1) / (shown + 100) of the item in `obp/dataset/obd/random/men/men.csv`.
"""

import re

import numpy as np
import pytest

from app.bandit.rollout.aggregates import DecisionPage, DecisionSums

# Item, `+` for a click, and the propensity in millionths.
LOG = """
2-45525 23-128890 13+363080 21-45005 13+313105 17-6500 3+63305 21+55095 13+221160 21-198550 23+176400 23-182525
13-252740 10-2065 14+7720 23-280750 23+251525 31-120700 13+460095 13-274970 17+84760 9-41320 31-176365 23+107885
17+105255 31-82155 13-173230 23+230005 17-134140 27+13605 0+233890 13-188525 27-78440 6-76190 17+120895
27-123045 6+99215 17+275560 0-98490 27+155705 14-91690 17+182320 10+96390 8-1455 17+275735 17+182475 17+200740
17-200740 27+460050 17-175100 10+153485 10-200000 27+120390 27-110925 0-254670 6+166060 3-4965 27-268520
27+198660 0-222465 0-191425 13-58300 12+10550 11-10690 31+145295 12-39015 27+163990 19-17985 13-163710 13+163765
6-119080 17+6235 0-572300 0+385240 31+160490 13-187130 6-96720 14-3490 0+263215 31-127690 0+245875 13-101375
13-179290 19+24380 13-227095 27+183005 27-164245 13-413600 1-41300 13+179970 6-41005 23+148290 21-121915
13+191110 13-142520 14-35260 0+211225 0-154815 6-120755 23-385025 0+277550 27+33495 13-184125 23-269965
23-262575 0-157320 13+271150 13-235170 23-197650 23+221005 31+69245 7-23135 0+195175 23+196050 23-270165
23-240455 0-277995 11-12870 23-280560 0-301335 27-12245 13+274765 0+187155 13-287075 0-234375 23+218380
23-189095 14+28020 13-170170 3+45940 13-215665 13+187900 3-21040 23-360900 27-143800 13-193340 12-32720
13-569545 13-181535 9+96405 23-159185 10-94370 27+300335 23-12395 13-321825 19-1380 17+128595 13+331540 3-3405
13-299350 23-180255 13+129020 10-48655 6-32515 0+13785 17+90995 3-120990 17-166675 13+317035 13+495225 13-459220
6+109300 13-354695 13-189215 13-202485 13+384975 13-339090 13+333890 27-159480
"""
# Of each item, how often it was shown and clicked.
MODEL = """
272:4 302:0 304:1 298:2 285:0 313:0 290:2 316:1 260:0 290:1 309:0 345:3 295:1 273:1 303:1 249:1 296:0 276:1
293:2 284:1 298:3 311:1 304:1 296:2 263:0 334:3 285:2 299:2 294:2 328:0 279:4 321:1 249:0 286:3
"""


def test_estimates_are_those_of_the_open_bandit_pipeline() -> None:
    rows = [(int(item), float(click == "+"), int(p) / 1e6) for item, click, p in re.findall(r"(\d+)([+-])(\d+)", LOG)]
    items, rewards, pi_b = (np.array(column) for column in zip(*rows, strict=True))
    shown, clicks = np.array([pair.split(":") for pair in MODEL.split()], np.float64).T
    q = (clicks + 1) / (shown + 100)
    policy = 1.0 + np.arange(len(q)) % 5
    policy /= policy.sum()
    none = np.zeros(len(rows))
    sums = DecisionSums()
    sums.add(
        DecisionPage(
            users=[f"user-{place}" for place in range(len(rows))],
            rewards=rewards,
            pi_b=pi_b,
            pi_champion=pi_b,
            pi_challenger=policy[items],
            q_logged=q[items],
            v_champion=none,
            v_challenger=none + policy @ q,
            dismissed=none,
            agreed=none,
            pi_pool=none,
            v_pool=none,
        )
    )
    found = sums.estimates(0.05, np.random.default_rng(1), replicates=10)
    assert (found.n, int(rewards.sum()), int(shown.sum())) == (169, 69, 10_000)
    assert found.ips.value == pytest.approx(0.19707782564753581, rel=1e-12)
    assert found.snips.value == pytest.approx(0.18868519021851604, rel=1e-12)
    assert found.dr.value == pytest.approx(0.19694825908561012, rel=1e-12)
