"""Broken recipes, like those of bad_recipes.py: paths that do not say plainly what they mean, or lead where no run writes."""

INVISIBLE = "expected a path, without line breaks or other invisible characters"
LONG = "a path has at most 4095 bytes, 255 between two slashes; choose a shorter one"
HOME = "write the path out, because '~' stands for no folder here; ./~ is a folder of that name"
NAME_RULE = "use lower-case letters, digits, '.', '_' and '-' only, and begin with a letter or a digit"

# how each field that is a path is written, its line, and its name in messages
FIELDS = (
    ("seed: 3", "output: {}", 2, "output"),
    ("path: data/tiny", "path: {}", 12, "data.path"),
    ("path: data/tiny", "sources: {{{}: 1}}", 12, "data.sources"),
    ("path: data/tiny", "path: data/tiny\n  corpus: {}", 13, "data.corpus"),
    ("path: data/tiny", "path: data/tiny\n  tokenizer: {}", 13, "data.tokenizer"),
    ("  family: llama", "  family: llama\n  init: {}", 5, "model.init"),
)
# as YAML, as it is shown, what is said
TRICKS = (
    ("./a/../b", "'./a/../b'", "a path must not go up by '..' after a name; write b"),
    ("../a/../../b", "'../a/../../b'", "a path must not go up by '..' after a name; write ../../b"),
    ("/tmp/../x", "'/tmp/../x'", "a path must not go up by '..' after a name; write /x"),
    ("' '", "' '", INVISIBLE),
    ("''", "''", INVISIBLE),
    ('"a\\nb"', "'a\\nb'", INVISIBLE),
    ('"a\\0b"', "'a\\x00b'", INVISIBLE),
    ('"a\\tb"', "'a\\tb'", INVISIBLE),
    ("'~/a'", "'~/a'", HOME),
    ("~root/a", "'~root/a'", HOME),
    ("x" * 256, f"'{'x' * 56}...", LONG),
    # two bytes a letter
    (f"a/{'é' * 128}", f"'a/{'é' * 54}...", LONG),
)
PATHS = [
    (old, new.format(text), f"{line}: {field}: {reason}; found the text {shown}")
    for old, new, line, field in FIELDS
    for text, shown, reason in TRICKS
]
# as a key, YAML has no such text
PATHS += [
    (old, new.format("a/" * 2048), f"{line}: {field}: {LONG}; found the text '{'a/' * 28}...")
    for old, new, line, field in FIELDS
    if field != "data.sources"
]
PATHS += [
    (
        "seed: 3",
        f"output: {path}",
        f"2: output: {system} is of the operating system; choose a folder for this run alone; found the text {path!r}",
    )
    for path, system in (
        ("/etc/longtrain", "/etc"),
        ("//etc/x", "/etc"),
        ("/usr/lib/x", "/usr"),
        ("/dev/x", "/dev"),
        ("/proc", "/proc"),
    )
]
PATHS += [
    (
        "seed: 3",
        "output: ../../../../etc/x/../../root/zz",
        "2: output: a path must not go up by '..' after a name; write ../../../../root/zz; "
        "found the text '../../../../etc/x/../../root/zz'",
    ),
    *(("seed: 3", f"extends: {text}", f"2: extends: {reason}") for text, _, reason in TRICKS if reason != INVISIBLE),
    ("seed: 3", 'extends: "a\\nb.yaml"', f"2: extends: {INVISIBLE}"),
    ("seed: 3", 'extends: "a\\0b"', f"2: extends: {INVISIBLE}"),
    ("seed: 3", "extends: ' '", "2: extends: expected one recipe, by the name of a built-in one or by its path"),
    ("seed: 3", "extends: ./nowhere.yaml", "2: extends: nowhere.yaml: no such file; check the path"),
    *(
        ("name: tiny", f"name: {text}", f"1: name: {NAME_RULE}; found the text {shown}")
        for text, shown in (
            ("../x", "'../x'"),
            ("a/b", "'a/b'"),
            ("/etc", "'/etc'"),
            (".hidden", "'.hidden'"),
            ('"a\\nb"', "'a\\nb'"),
            ('"a\\0b"', "'a\\x00b'"),
            ("' '", "' '"),
        )
    ),
]

# Files that are not there, with what `longtrain train` says of them in a folder that holds the recipe alone.
MISSING = [
    ("path: data/tiny", "path: d/nothere", "12: data.path: d/nothere: no such data folder", "--vocab-size 64 --out d/nothere "),
    ("path: data/tiny", "sources: {a: 1, b: 2}", "12: data.sources: a: no such data folder", "--vocab-size 64 --out b "),
    ("path: data/tiny", "path: x.yaml", "12: data.path: x.yaml: is a file, not a folder", "scripts/prepare_data.py makes one"),
    (
        "path: data/tiny",
        "path: gone\n  tokenizer: no/model",
        "12: data.path: gone: no such data folder",
        "\n  # first put the tokenizer there: data.tokenizer is no/model, and is not there yet\n  python scripts/prepare_data.py",
    ),
    (
        "  family: llama",
        "  family: llama\n  init: no/weights",
        "13: data.path: data/tiny: no such data folder",
        "\n  # first put the tokenizer there: model.init is no/weights, and is not there yet\n  python scripts/prepare_data.py",
    ),
    (
        "  family: llama\n  vocab_size: 64\n  hidden_size: 32\n  layers: 2\n  heads: 4\n  kv_heads: 2\n  intermediate_size: 48",
        "  init: no/weights",
        "4: model.init: there is no folder no/weights",
        "put a Hugging Face folder",
    ),
    (
        "  family: llama\n  vocab_size: 64\n  hidden_size: 32\n  layers: 2\n  heads: 4\n  kv_heads: 2\n  intermediate_size: 48",
        "  preset: llama-2-7b\n  init: weights/l 2",
        "7: data.path: data/tiny: no such data folder",
        "\n  hf download meta-llama/Llama-2-7b-hf --exclude '*.bin' --local-dir 'weights/l 2'\n"
        "  python scripts/prepare_data.py --source SOURCE --tokenizer 'weights/l 2' --out data/tiny --sequence-length 64\n",
    ),
]
