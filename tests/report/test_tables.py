"Tables in a terminal."
from fastrecipes.report.tables import aligned


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_with_their_last_letter():
    assert aligned([('', 'accuracy', ''), ('resnet18', '9', 'kept'), ('a', '99.5 %', '')]) == ['          accuracy', 'resnet18  9         kept', 'a         99.5 %']
