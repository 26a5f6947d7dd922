"""
The built-in synthetic data: groups of users with planted preferences and a wording of their own.

It needs no download and its truth is known: what each group likes, which aspects an item has, how a group
writes. A model that finds the groups rates better than user and item biases can, and explains in the right
words.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value

from .errors import DataError, show_names
from .splits import SPLITS, random_split
from .wordings import ASPECTS, KINDS, WORDINGS, find_wording

logger = logging.getLogger(__name__)

_MIN_RATING, _MAX_RATING = 1.0, 5.0
_NEUTRAL_RATING = 3.0
_TRUTH_FILE = "truth.json"
_DESIGNS_TRIED = 200


@dataclass(frozen=True)
class SyntheticConfig:
    """
    Settings of the synthetic data.

    Args:
        num_users (`int`, defaults to 240): Users, spread evenly over the groups. At least one for each group.
        num_items (`int`, defaults to 60): Items. At least 2.
        num_groups (`int`, defaults to 3): Groups of users, 2 to 5.
        num_aspects (`int`, defaults to 12): Aspects that items can have, 8 to 16.
        records_per_user (`int`, defaults to 16): Distinct items that each user rates, up to `num_items`.
        strength (`float`, defaults to 3.0): Points that a rating moves where a group likes, or dislikes, all
            of an item's aspects. Greater than 0.
        bias_scale (`float`, defaults to 0.15): Standard deviation, in rating points, of the users' and of the
            items' own biases. At least 0.
        noise (`float`, defaults to 0.3): Standard deviation, in rating points, of the noise that is added
            before a rating is rounded. At least 0.
        seed (`int`, defaults to 0): The same settings give the same data.

    Raises:
        DataError: A setting is out of range.
    """

    num_users: int = 240
    num_items: int = 60
    num_groups: int = 3
    num_aspects: int = 12
    records_per_user: int = 16
    strength: float = 3.0
    bias_scale: float = 0.15
    noise: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_whole("num_groups", 2, len(WORDINGS))
        self._check_whole("num_aspects", 8, len(ASPECTS))
        self._check_whole("num_users", self.num_groups)
        self._check_whole("num_items", 2)
        self._check_whole("records_per_user", 1, self.num_items)
        self._check_whole("seed", 0)
        for name in ("strength", "bias_scale", "noise"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
            if not is_number or value < 0 or (name == "strength" and value == 0):
                least = "greater than 0" if name == "strength" else "of at least 0"
                default = type(self).__dataclass_fields__[name].default
                raise DataError(
                    f"SyntheticConfig: expected {name} to be a finite number {least}, but got {value!r}. The "
                    f"default is {default}."
                )

    def _check_whole(self, name: str, lowest: int, highest: int | None = None) -> None:
        value = getattr(self, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or value < lowest or (highest is not None and value > highest):
            limits = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            default = type(self).__dataclass_fields__[name].default
            raise DataError(
                f"SyntheticConfig: expected {name} to be a whole number {limits}, but got {value!r}. The "
                f"default is {default}."
            )


@dataclass(frozen=True, eq=False)
class SyntheticTruth:
    """
    What was planted in the synthetic data.

    Attributes:
        config ([`SyntheticConfig`]): The settings it was generated with.
        aspects (`tuple[str, ...]`): The names of the aspects.
        group_preferences (`np.ndarray` of `int64`, shape `(num_groups, num_aspects)`): 1 where a group likes
            an aspect, -1 where it dislikes it, else 0.
        user_group (`dict[str, int]`): The group of each user.
        item_aspects (`dict[str, tuple[str, ...]]`): The 3 or 4 aspects of each item.
        item_kind (`dict[str, str]`): What each item is, such as `"guitar strap"`.
        user_bias (`dict[str, float]`): How much higher each user rates, in rating points.
        item_bias (`dict[str, float]`): How much higher each item is rated, in rating points.
    """

    config: SyntheticConfig
    aspects: tuple[str, ...]
    group_preferences: np.ndarray
    user_group: dict[str, int]
    item_aspects: dict[str, tuple[str, ...]]
    item_kind: dict[str, str]
    user_bias: dict[str, float]
    item_bias: dict[str, float]

    def expected_rating(self, user: str, item: str) -> float:
        """
        Return the rating of a pair before noise and rounding.

        Args:
            user (`str`): A user of the data.
            item (`str`): An item of the data, rated by that user or not.

        Returns:
            `float`: From 1 to 5.

        Raises:
            DataError: The data has no such user or item.
        """
        if user not in self.user_group or item not in self.item_aspects:
            raise DataError(
                f"expected a user and an item of the synthetic data, such as {next(iter(self.user_group))!r} "
                f"and {next(iter(self.item_aspects))!r}, but got {user!r} and {item!r}. Take both from its "
                "records."
            )
        match = np.mean([self.preference(user, aspect) for aspect in self.item_aspects[item]])
        rating = _NEUTRAL_RATING + self.config.strength * match + self.user_bias[user] + self.item_bias[item]
        return float(np.clip(rating, _MIN_RATING, _MAX_RATING))

    def preference(self, user: str, aspect: str) -> int:
        """
        Return what a user's group thinks of an aspect.

        Args:
            user (`str`): A user of the data.
            aspect (`str`): One of `aspects`.

        Returns:
            `int`: 1 likes it, -1 dislikes it, 0 is indifferent.
        """
        return int(self.group_preferences[self.user_group[user], self.aspects.index(aspect)])

    def wording_group(self, text: str) -> int | None:
        """
        Tell which group's wording a text uses.

        Args:
            text (`str`): Any text, such as a generated explanation.

        Returns:
            `int` or `None`: The group whose marker words the text has most of; `None` where no group's words
            prevail.
        """
        return find_wording(text, self.config.num_groups)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """
        Write the truth to a file, beside it first and then renamed, so that no half of a file is ever there.

        Args:
            path (`str` or `os.PathLike`): The file, usually `truth.json`.
        """
        _write_together({Path(path): self._to_text()})

    def _to_text(self) -> str:
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["config"] = dataclasses.asdict(self.config)
        content["group_preferences"] = self.group_preferences.tolist()
        return json.dumps({"synthetic": True, **content}, indent=2) + "\n"

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "SyntheticTruth":
        """
        Read what [`~SyntheticTruth.to_json`] wrote.

        Args:
            path (`str` or `os.PathLike`): The file.

        Returns:
            [`SyntheticTruth`]: The same truth.

        Raises:
            DataError: The file is missing or is not the truth of synthetic data.
        """
        remedy = "Write it with write_synthetic or SyntheticTruth.to_json."
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: expected the truth of synthetic data, but got {error}. {remedy}") from error
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if not isinstance(content, dict) or name not in content]
        if missing:
            raise DataError(
                f"{path}: expected the truth of synthetic data, but {show_names(missing)} are missing. {remedy}"
            )
        try:
            values = {name: content[name] for name in names}
            values["config"] = SyntheticConfig(**values["config"])
            values["aspects"] = tuple(values["aspects"])
            values["group_preferences"] = np.asarray(values["group_preferences"], dtype=np.int64)
            values["item_aspects"] = {item: tuple(names) for item, names in values["item_aspects"].items()}
        except (TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: expected the truth of synthetic data, but got {error}. {remedy}") from error
        return cls(**values)


@dataclass(frozen=True, eq=False)
class SyntheticData:
    """
    Synthetic records and what was planted in them.

    Attributes:
        records ([`~datasets.DatasetDict`]): `train`, `validation` and `test`, as [`load_records`] returns
            them.
        truth ([`SyntheticTruth`]): What was planted.
    """

    records: DatasetDict
    truth: SyntheticTruth


def generate_synthetic(config: SyntheticConfig | None = None) -> SyntheticData:
    """
    Generate synthetic records with planted preferences, split 8:1:1 at random.

    A rating is `round(clip(expected rating + noise))` on 1 to 5, where the expected rating is 3 plus
    `strength` times the mean of the group's preferences over the item's aspects, plus small biases. Over the
    groups the preferences for an aspect sum to about 0, so that an item's mean rating says little.

    Args:
        config ([`SyntheticConfig`], *optional*): The settings; the defaults where it is not given.

    Returns:
        [`SyntheticData`]: The records and the truth.

    Raises:
        DataError: The settings give too few records for three splits.
    """
    config = SyntheticConfig() if config is None else config
    rng = np.random.default_rng(config.seed)
    truth = _plant(config, rng)
    features = Features(
        {
            "user": Value("string"),
            "item": Value("string"),
            "rating": Value("float64"),
            "feature": List(Value("string")),
            "explanation": Value("string"),
        }
    )
    records = Dataset.from_list(_draw_records(truth, rng), features=features)
    records.info.description = f"Synthetic records of gavamoe_hf, generated with {config}."
    return SyntheticData(random_split(records, seed=config.seed), truth)


def write_synthetic(folder: str | os.PathLike[str], config: SyntheticConfig | None = None) -> SyntheticData:
    """
    Generate synthetic records and write them as `train.jsonl`, `validation.jsonl`, `test.jsonl` and
    `truth.json`.

    Every file is written beside its place and renamed at the end, so that no half of a file is ever there.
    [`load_records`] reads the folder.

    Args:
        folder (`str` or `os.PathLike`): The folder, made where it does not exist. Files of these names are
            replaced; all others are left alone.
        config ([`SyntheticConfig`], *optional*): The settings; the defaults where it is not given.

    Returns:
        [`SyntheticData`]: What was written.

    Raises:
        DataError: The settings give too few records for three splits.
    """
    data = generate_synthetic(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {folder / _TRUTH_FILE: data.truth._to_text()}
    for split in SPLITS:
        texts[folder / f"{split}.jsonl"] = "".join(_json_line(row) for row in data.records[split])
    _write_together(texts)
    logger.info("wrote synthetic records (%s) to %s", data.truth.config, folder)
    return data


def _plant(config: SyntheticConfig, rng: np.random.Generator) -> SyntheticTruth:
    users = _names("user", config.num_users)
    items = _names("item", config.num_items)
    # Shuffled, so that neither a user's nor an item's number tells what it is.
    groups = rng.permutation(np.arange(config.num_users) % config.num_groups).tolist()
    kinds = rng.permutation(np.arange(config.num_items) % len(KINDS)).tolist()
    aspects = ASPECTS[: config.num_aspects]
    preferences = _draw_preferences(config, rng)
    item_aspects = {}
    for item in items:
        chosen = rng.choice(config.num_aspects, size=int(rng.integers(3, 5)), replace=False)
        item_aspects[item] = tuple(aspects[index] for index in chosen)
    return SyntheticTruth(
        config=config,
        aspects=aspects,
        group_preferences=preferences,
        user_group=dict(zip(users, groups, strict=True)),
        item_aspects=item_aspects,
        item_kind={item: KINDS[kind] for item, kind in zip(items, kinds, strict=True)},
        user_bias=_draw_biases(users, config, rng),
        item_bias=_draw_biases(items, config, rng),
    )


def _names(prefix: str, count: int) -> list[str]:
    width = max(3, len(str(count - 1)))
    return [f"{prefix}_{number:0{width}d}" for number in range(count)]


def _draw_biases(names: list[str], config: SyntheticConfig, rng: np.random.Generator) -> dict[str, float]:
    biases = rng.normal(0.0, config.bias_scale, size=len(names))
    return dict(zip(names, biases.tolist(), strict=True))


def _draw_preferences(config: SyntheticConfig, rng: np.random.Generator) -> np.ndarray:
    """
    Draw who likes what: for each aspect as many groups like it as dislike it (an odd one is indifferent).

    Each column then sums to 0. Of several draws, the one with the most different and most even groups is
    kept.
    """
    half = config.num_groups // 2
    signs = [1] * half + [-1] * half + [0] * (config.num_groups % 2)
    patterns = np.asarray(sorted(set(permutations(signs))))
    best: np.ndarray | None = None
    best_score: tuple[int, int] | None = None
    for _ in range(_DESIGNS_TRIED):
        cycles = -(-config.num_aspects // len(patterns))
        rows = np.concatenate([rng.permutation(len(patterns)) for _ in range(cycles)])
        # Whole cycles stay whole, which balances the groups; then their order must not tell the pattern.
        preferences = rng.permutation(patterns[rows[: config.num_aspects]]).T
        differing = (preferences[:, None] != preferences[None]).sum(axis=2)
        closest = int(differing[~np.eye(config.num_groups, dtype=bool)].min())
        score = (closest, -int(np.abs(preferences.sum(axis=1)).max()))
        if best_score is None or score > best_score:
            best, best_score = preferences, score
    assert best is not None
    return best


def _draw_records(truth: SyntheticTruth, rng: np.random.Generator) -> list[dict[str, Any]]:
    config = truth.config
    items = list(truth.item_aspects)
    records = []
    for user in truth.user_group:
        for index in rng.choice(len(items), size=config.records_per_user, replace=False):
            item = items[index]
            raw = truth.expected_rating(user, item) + rng.normal(0.0, config.noise)
            rating = float(np.rint(np.clip(raw, _MIN_RATING, _MAX_RATING)))
            is_positive = rating >= _NEUTRAL_RATING
            feature = _pick_feature(truth, user, item, is_positive, rng)
            explanation = _write_explanation(truth, user, item, feature, is_positive, rng)
            records.append(
                {
                    "user": user,
                    "item": item,
                    "rating": rating,
                    "feature": [feature],
                    "explanation": explanation,
                }
            )
    return records


def _pick_feature(truth: SyntheticTruth, user: str, item: str, is_positive: bool, rng: np.random.Generator) -> str:
    """Pick an aspect that agrees with the rating, as far as the item has one."""
    sign = 1 if is_positive else -1
    agreement = [sign * truth.preference(user, aspect) for aspect in truth.item_aspects[item]]
    best = [
        aspect for aspect, value in zip(truth.item_aspects[item], agreement, strict=True) if value == max(agreement)
    ]
    return best[rng.integers(len(best))]


def _write_explanation(
    truth: SyntheticTruth, user: str, item: str, feature: str, is_positive: bool, rng: np.random.Generator
) -> str:
    wording = WORDINGS[truth.user_group[user]]
    templates = wording.positive if is_positive else wording.negative
    adjectives = wording.praise if is_positive else wording.blame
    return templates[rng.integers(len(templates))].format(
        kind=truth.item_kind[item], feature=feature, adjective=adjectives[rng.integers(len(adjectives))]
    )


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps({**row, "rating": int(row["rating"]), "feature": row["feature"][0]}) + "\n"


def _write_together(texts: Mapping[Path, str]) -> None:
    """Write files beside their places and rename them once all are written."""
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in texts}
    try:
        for path, text in texts.items():
            beside[path].write_text(text, encoding="utf-8")
        for path, temporary in beside.items():
            temporary.replace(path)
    finally:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)
