from fedhyper_jax.engine.simulation import Progress
from fedhyper_jax.shell.progress import ProgressBar, chunk_length


def chunk(first, done, seconds):
    return Progress(first, done, 10, None, None, seconds)


def test_speed_and_time_left_do_not_count_compilation(capsys):
    with ProgressBar(total_rounds=20, programs=2, quiet=True) as bar:
        bar.start_part("a")
        bar(chunk(0, 5, 100.0))
        assert bar.rounds_per_second is None and bar._speed() == "measuring"
        bar(chunk(5, 10, 1.0))
        assert bar.rounds_per_second == 5.0
        assert bar._speed() == "5 rounds/s, ETA 1:42"  # 10 rounds at 5 a second, and 100 s to compile
        bar.start_part("b")
        bar(chunk(0, 5, 50.0))
        bar(chunk(5, 10, 1.0))
    assert (bar.first_chunk_seconds, bar.steady_seconds, bar.rounds_done) == (150.0, 2.0, 20)
    assert bar._speed() == "5 rounds/s"
    assert capsys.readouterr() == ("", "")


def test_parts_that_share_a_program_compile_once():
    with ProgressBar(total_rounds=40, programs=2, quiet=True) as bar:
        bar.compiled("one", 30.0)
        bar.start_part("a", program="one")
        bar(chunk(0, 10, 2.0))
        assert bar._speed() == "5 rounds/s, ETA 0:36"  # 30 rounds at 5 a second, and 30 s to compile the other program
        bar.start_part("b", rounds_done=10, program="other")  # of an earlier process, so nothing was compiled for it
        bar.start_part("c", program="other")
        bar(chunk(0, 5, 50.0))
        bar.start_part("d", program="other")
        bar(chunk(0, 5, 1.0))
    assert (bar.first_chunk_seconds, bar.steady_seconds, bar.steady_rounds) == (80.0, 3.0, 15)


def test_the_bar_is_on_standard_error(capsys):
    with ProgressBar(total_rounds=2, programs=1, quiet=False) as bar:
        bar.start_part("fedavg")
        bar(chunk(0, 1, 0.1))
        bar(chunk(1, 2, 0.1))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err and "10 rounds/s" in captured.err


def test_chunks_are_short_and_even_where_they_can_be():
    for rounds in range(1, 200):
        length = chunk_length(rounds)
        assert 1 <= length <= 10 and (rounds == 1 or length < rounds)
        if any(rounds % fair == 0 for fair in range(5, 11)) and rounds > 10:
            assert rounds % length == 0
