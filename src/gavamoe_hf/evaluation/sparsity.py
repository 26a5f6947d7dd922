"""The thirds of a test split by how well training knows the users (figure 4)."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

THIRDS = ("ds1", "ds2", "ds3")


def sparsity_thirds(train_users: Sequence[str], users: Sequence[str]) -> dict[str, list[int]]:
    """
    Cuts records into three equal parts by how often the record's user occurs in train, most frequent first (figure 4).

    Users of equally many records stand in the order of their first record here, and each user's records in theirs. A
    cut goes through a user's records where the parts would not be equal otherwise; one or two records that are left
    over go to the first parts.

    Args:
        train_users (`Sequence[str]`): The user of each training record.
        users (`Sequence[str]`): The user of each record to divide, such as those of the test split.

    Returns:
        `dict[str, list[int]]`: Positions in `users` of `ds1` (the most frequent users), `ds2` and `ds3` (the least),
        each ascending.
    """
    count = Counter(train_users)
    first = {user: position for position, user in reversed(list(enumerate(users)))}
    order = sorted(range(len(users)), key=lambda position: (-count[users[position]], first[users[position]], position))
    return {
        name: sorted(part.tolist()) for name, part in zip(THIRDS, np.array_split(np.array(order, int), 3), strict=True)
    }
