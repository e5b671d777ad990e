"A file is whole or not there."
import pytest

from fastrecipes.files import whole


def test_it_appears_at_the_end_and_replaces_what_was_there(tmp_path):
    path = tmp_path/'deep'/'a.txt'
    for text in ('one', 'two'):
        with whole(path) as tmp:
            tmp.write_text(text)
            assert not path.exists() or path.read_text() == 'one'
        assert path.read_text() == text and [p.name for p in path.parent.iterdir()] == ['a.txt']


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path/'a.txt').write_text('old')
    with pytest.raises(KeyboardInterrupt), whole(tmp_path/'a.txt') as tmp:
        tmp.write_text('half')
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a.txt', 'old')]
