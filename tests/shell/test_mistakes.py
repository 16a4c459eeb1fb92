import pytest

from fedhyper_jax.shell.arguments import (
    BenchArguments,
    CompareArguments,
    DataArguments,
    LaunchArguments,
    MethodsArguments,
    PlotArguments,
    RunArguments,
    parse,
)
from fedhyper_jax.shell.config import ConfigError

COMMANDS = {
    **{"run": RunArguments, "compare": CompareArguments, "plot": PlotArguments, "data": DataArguments},
    **{"methods": MethodsArguments, "launch": LaunchArguments, "bench": BenchArguments},
}
MISTAKES = {
    "run --local-rate abc": "--local-rate must be a number, got 'abc'; ",
    "run --local_rate abc": "--local-rate must be a number, got 'abc'; ",
    "run --rounds=3.5": "--rounds must be an integer, got '3.5'; ",
    "run --target": "--target must be a number, got nothing; ",
    "run --local-rate 0.1 0.2": "--local-rate must be a number, got '0.1' '0.2'; ",
    "run --hidden 8 -1 a": "--hidden must be a list of integers, got '8' '-1' 'a'; ",
    "run --global-bounds 1 x": "--global-bounds must be a string or a list of 2 numbers, got '1' 'x'; ",
    "run --options a": "--options must be names and values in turn, got 'a'; ",
    "run --quiet 3": "--quiet takes no value, got '3'; ",
    "run --no-evaluate-clients=yes": "--no-evaluate-clients takes no value, got 'yes'; ",
    "run --rounds 3 --roundz 3 --seed x": "unknown option '--roundz'; did you mean --rounds? ",
    "run --methods G": "unknown option '--methods'; did you mean --method? ",
    "run --bogus": "unknown option '--bogus'; ",
    "run -x": "unknown option '-x'; ",
    "run rounds": "unexpected 'rounds'; options begin with --; ",
    "compare --seeds a": "--seeds must be an integer or a list of integers, got 'a'; ",
    "compare --local-rates 0.1 b": "--local-rates must be a list of numbers, got '0.1' 'b'; ",
    "data --data digits --alpha None": "--alpha must be a number, got 'None'; ",
    "plot": "`fedhyper plot` needs a folder; ",
    "plot a b": "unexpected 'b'; options begin with --; ",
    "methods --markdown a b": "unexpected 'b'; options begin with --; ",
    "methods --markdown scaffold --mrakdown": "unknown option '--mrakdown'; did you mean --markdown? ",
    "bench --repeats 3 mlp --rounds": "--rounds must be an integer, got nothing; ",
    "bench mlp --repeats x": "--repeats must be an integer, got 'x'; ",
    "launch --processes 2 rnu": "--processes must be an integer, got '2' 'rnu'; ",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_with_help_named_once(line):
    command, *arguments = line.split()
    with pytest.raises(ConfigError) as error:
        parse(COMMANDS[command], arguments, command, None)
    assert str(error.value) == f"{MISTAKES[line]}see `fedhyper {command} --help`"
