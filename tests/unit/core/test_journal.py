import json

import pytest

from edgesft.core.errors import ArtifactError
from edgesft.core.journal import Journal


def test_records_survive_and_new_ones_follow(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append({"step": 0, "g": 0.1 + 0.2})
    journal.append({"step": 1, "seed": 2**63 - 1}, sync=False)
    journal.close()
    again = Journal(path)
    assert again.records == [{"step": 0, "g": 0.1 + 0.2}, {"step": 1, "seed": 2**63 - 1}]
    again.append({"step": 2})
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("cut", range(1, 22))
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path, cut):
    path = tmp_path / "j"
    line = b'{"step": 1, "g": 1.5}\n'
    path.write_bytes(b'{"step": 0}\n' + line[:cut])
    journal = Journal(path)
    assert journal.records == [{"step": 0}]
    journal.append({"step": 1})
    journal.close()
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ArtifactError, match="line 2"):
        Journal(path)
