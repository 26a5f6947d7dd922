"""`reviews.pickle` and index files: what is read, what is refused, and that no pickle has anything run."""

import collections
import copyreg
import json
import os
import pickle
import struct

import pytest

from gavamoe_hf.cli.main import main as gavamoe
from gavamoe_hf.data import DataError, load_records

SPLITS = {"train": range(0, 14), "validation": range(14, 17), "test": range(17, 20)}


def make_reviews(count=20):
    """In the published form; every user and item occurs early."""
    return [
        {
            "user": f"u{number % 3}",
            "item": f"i{number % 4}",
            "rating": number % 5 + 1,
            "template": (["pool", "view"][number % 2], "nice", f"the sentence {number}", 1),
            "predicted": "room",
        }
        for number in range(count)
    ]


def write(folder, reviews=None, indices=SPLITS, index_folder="1", protocol=4):
    data = reviews if isinstance(reviews, bytes) else pickle.dumps(reviews or make_reviews(), protocol)
    (folder / "reviews.pickle").write_bytes(data)
    where = folder / index_folder
    where.mkdir(exist_ok=True)
    for split, rows in indices.items():
        text = rows if isinstance(rows, str) else " ".join(map(str, rows))
        (where / f"{split}.index").write_text(text)
    return folder


# Reading


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_splits_are_those_of_the_index_files_in_their_order(tmp_path, protocol):
    indices = {"train": list(range(13, -1, -1)), "validation": [16, 14], "test": "19 17 18\n"}
    records = load_records(write(tmp_path, indices=indices, protocol=protocol))
    assert records["train"][0] == {
        "user": "u1",
        "item": "i1",
        "rating": 4.0,
        "feature": ["view"],
        "explanation": "the sentence 13",
    }
    found = {split: [int(text.split()[-1]) for text in records[split]["explanation"]] for split in records}
    assert found == {"train": list(range(13, -1, -1)), "validation": [16, 14], "test": [19, 17, 18]}


def test_adjective_can_stand_for_the_feature(tmp_path):
    records = load_records(write(tmp_path), column_mapping={"feature": "adjective"})
    assert set(map(tuple, records["train"]["feature"])) == {("nice",)}


def test_index_folder_chooses_the_split(tmp_path):
    write(tmp_path)
    write(tmp_path, indices={**SPLITS, "validation": [17], "test": [14]}, index_folder="2")
    assert load_records(tmp_path)["test"]["explanation"] == [f"the sentence {number}" for number in (17, 18, 19)]
    assert load_records(tmp_path, index_folder="2")["test"]["explanation"] == ["the sentence 14"]
    # Index files beside the pickle come before those of a sub-folder
    write(tmp_path, indices={**SPLITS, "test": [19]}, index_folder=".")
    assert load_records(str(tmp_path))["test"]["explanation"] == ["the sentence 19"]
    with pytest.raises(DataError, match=r"'test.index' are not there|Sub-folders with index files: '1', '2'"):
        load_records(tmp_path, index_folder="3")


def test_a_folder_with_train_files_is_read_as_before(tmp_path):
    write(tmp_path, b"not read at all")
    rows = [{"user": "a", "item": "b", "rating": 3, "explanation": f"text {number}"} for number in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(load_records(tmp_path)["train"]["user"]) == {"a"}
    with pytest.raises(DataError, match=r"expected no index_folder, which is for a folder with reviews.pickle"):
        load_records(tmp_path, index_folder="1")


def test_train_takes_the_folder_and_names_a_bad_row_of_the_pickle(tmp_path, capsys):
    reviews = make_reviews()
    reviews[17]["rating"] = 6
    options = ["--dataset", str(write(tmp_path, reviews)), "--index_folder", "1", "--output_dir", str(tmp_path / "out")]
    assert gavamoe(["train", *options]) == 1
    error = capsys.readouterr().err
    assert "reviews.pickle (test): column 'rating'" in error and "6 (not on the scale) in row 18" in error


# Pickles that would run something


class Reduced:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    pass


def global_opcode(protocol, module, name, argument):
    """`module.name(argument)` in the opcodes of an old or a new protocol."""
    if protocol == 0:
        return f"c{module}\n{name}\n(V{argument}\ntR.".encode()
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + texts + b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


def malicious(trace):
    """By name: pickles that create the file `trace` as soon as they are loaded plainly."""
    touch = f"touch {trace}"
    nested = make_reviews()
    nested[11]["template"] = ("pool", "nice", Reduced(os.system, touch), 1)
    in_set = make_reviews()
    in_set[3]["predicted"] = {("deep", (Reduced(os.system, touch),))}
    in_key = [{**make_reviews()[0], Reduced(os.system, touch): 1}]
    extension = b"\x80\x02\x82\xf0\x8c" + bytes([len(touch)]) + touch.encode() + b"\x85R."
    return {
        "reduce": pickle.dumps(Reduced(os.system, touch)),
        "reduce, oldest protocol": pickle.dumps(Reduced(os.system, touch), 0),
        "GLOBAL": global_opcode(0, "os", "system", touch),
        "STACK_GLOBAL": global_opcode(4, "os", "system", touch),
        "INST": f"(V{touch}\nios\nsystem\n.".encode(),
        "OBJ": f"(cos\nsystem\nV{touch}\no.".encode(),
        "nested in a template": pickle.dumps(nested),
        "nested in a set": pickle.dumps(in_set),
        "as a key": pickle.dumps(in_key),
        "eval by builtins": global_opcode(4, "builtins", "eval", f"__import__('os').system({touch!r})"),
        "extension code": extension,
    }


@pytest.fixture
def extension_code():
    """os.system under a code of copyreg's, which a pickle that was loaded earlier has looked up."""
    copyreg.add_extension("posix", "system", 0xF0)
    assert pickle.loads(b"\x80\x02\x82\xf0.") is os.system
    yield
    copyreg.remove_extension("posix", "system", 0xF0)


@pytest.mark.parametrize("name", malicious(""))
def test_nothing_of_a_pickle_is_run(tmp_path, name, request):
    trace = tmp_path / "ran"
    data = malicious(trace)[name]
    if name == "extension code":
        request.getfixturevalue("extension_code")
    if name != "as a key":
        # The pickle does what it is made for, or its refusal would say nothing
        pickle.loads(data)
        assert trace.exists()
        trace.unlink()
    expected = "builtins.eval" if "eval" in name else r"(posix|os)\.system"
    with pytest.raises(DataError, match=rf"the pickle asks for {expected}\. Nothing of it was run"):
        load_records(write(tmp_path, data))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Plain(), r"(copyreg|copy_reg)\._reconstructor|test_published_data\.Plain"),
        (collections.OrderedDict(a=1), r"collections\.OrderedDict"),
        (Plain, r"test_published_data\.Plain"),
        (len, r"(builtins|__builtin__)\.len"),
        (1j, r"(builtins|__builtin__)\.complex"),
    ],
    ids=["object", "ordered dict", "class", "function", "complex number"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_classes_are_refused_however_harmless(tmp_path, value, name, protocol):
    reviews = make_reviews()
    reviews[5]["predicted"] = value
    with pytest.raises(DataError, match=rf"asks for ({name})\. Nothing"):
        load_records(write(tmp_path, pickle.dumps(reviews, protocol)))


def test_persistent_ids_and_foreign_buffers_are_refused(tmp_path):
    for data in (b"Pname\n.", b"\x80\x05\x97."):
        with pytest.raises(DataError, match="expected a pickle, but reading it failed with UnpicklingError"):
            load_records(write(tmp_path, data))


# Broken files


def test_every_cut_of_a_pickle_is_an_error(tmp_path):
    whole = pickle.dumps(make_reviews(5), 4)
    for length in (0, 1, 2, 11, 40, len(whole) // 2, len(whole) - 1):
        with pytest.raises(DataError, match=r"reviews\.pickle: expected a pickle, .*It may have been cut off"):
            load_records(write(tmp_path, whole[:length]))


def test_a_length_that_lies_is_an_error(tmp_path):
    with pytest.raises(DataError, match="expected a pickle"):
        load_records(write(tmp_path, b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"text."))


def changed(**values):
    reviews = make_reviews()
    reviews[2].update(values)
    return reviews


def nested_lists(depth=60):
    """Sixty lists, whose text would have 2^60 letters."""
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("reviews", "message"),
    [
        ({"user": 1}, "expected a pickled list of dicts, but got a dict"),
        (pickle.dumps([]), "expected at least one record, but the list is empty"),
        (
            [*make_reviews(), ("u", "i")],
            "expected a dict in every record, but got a value of type tuple of 2 in row 21",
        ),
        ([{"user": "u", "item": "i", "rating": 1}], "expected the key 'template' in every record"),
        (
            changed(template=("pool", "nice", "text")),
            r"a template of 4 .*, but got a value of type tuple of 3 in row 3",
        ),
        (changed(template=None), "a template of 4 .*, but got a value of type NoneType in row 3"),
        (changed(user=nested_lists()), "a string or a number as user in every record, but got .* list of 2 in row 3"),
        (
            changed(item=10**10_000),
            "a string or a number as item in every record, but got a value of type int in row 3",
        ),
        (changed(rating=b"5"), "a string or a number as rating in every record, but got a value of type bytes"),
        (changed(rating="x"), r"column 'rating': .*'x' \(not a number\) in row 3"),
        (changed(rating=float("nan")), "column 'rating': .*nan in row 3"),
        (changed(user=None), r"column 'user': .*nothing \(null\) in row 3"),
        (changed(template=("pool", "nice", " ", 1)), "column 'explanation': .* in row 3"),
    ],
)
def test_records_that_are_not_as_published_are_named(tmp_path, reviews, message):
    with pytest.raises(DataError, match=message):
        load_records(write(tmp_path, reviews))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"test": "17 18 20"}, r"test\.index: expected whole numbers from 0 to 19, .* but got '20' in place 3"),
        ({"test": "17 -1"}, "but got '-1' in place 2"),
        ({"test": "17 1.5 x"}, r"but got '1\.5' in place 2, 'x' in place 3 \(2 places in all\)"),
        ({"test": "1" * 100_000}, r"but got '1+\.\.\. in place 1"),
        ({"test": "17 ٣"}, "but got '٣' in place 2"),
        ({"test": " \n"}, r"test\.index: expected at least one index, but got none"),
        ({"train": "0 1 2 2 3 1"}, r"train\.index: expected each index once, but 2 repeat earlier ones, such as 1"),
        ({"test": "17 13 12"}, r"share no record, but 2 are in both train\.index and test\.index, such as 12"),
        ({"validation": "17"}, r"1 are in both validation\.index and test\.index, such as 17"),
    ],
)
def test_bad_indices_are_named(tmp_path, indices, message):
    with pytest.raises(DataError, match=message):
        load_records(write(tmp_path, indices={**SPLITS, **indices}))


def test_missing_files_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / "1" / "validation.index").unlink()
    with pytest.raises(DataError, match=r"'validation\.index' is not there"):
        load_records(tmp_path)
    with pytest.raises(DataError, match="Sub-folders with index files: '1'"):
        load_records(tmp_path, index_folder="4")
    (tmp_path / "reviews.pickle").unlink()
    with pytest.raises(DataError, match="expected a file train with one of the suffixes"):
        load_records(tmp_path)


def test_held_out_records_of_unknown_users_are_refused_as_elsewhere(tmp_path):
    reviews = make_reviews()
    reviews[18]["user"] = "stranger"
    with pytest.raises(DataError, match=r"1 of 3 records of test have 1 user \('stranger'\)"):
        load_records(write(tmp_path, reviews))
    assert len(load_records(tmp_path, unknown_held_out="drop")["test"]) == 2
