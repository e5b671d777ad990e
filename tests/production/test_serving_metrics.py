"Counters in shared memory: forked processes count, one reads; the text is what Prometheus parses."
import os
import re

import pytest

from fastrecipes.production.serving_metrics import Metrics


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_what_forked_workers_count_is_one_sum_and_survives_them():
    metrics = Metrics(3)
    for worker, n in (('a', 2), ('b', 3), ('c', 4)):
        if worker == 'c': metrics.take_back('a')               # it died: its slot goes on
        metrics.give_slot(worker)
        if not (pid := os.fork()):
            for _ in range(n): metrics.request('/predict', 200, .02)
            metrics.in_flight(1)
            os._exit(0)
        os.waitpid(pid, 0)
    text = metrics.text()
    assert 'fastrecipes_requests_total{route="/predict",status="200"} 9\n' in text
    assert 'fastrecipes_predictions_in_flight 2\n' in text      # what a had under way is over
    assert metrics.owners == ['c', 'b', None]


def test_the_histogram_is_cumulative_and_has_its_sum():
    metrics = Metrics()
    for seconds in (.004, .005, .03, .2, 20.): metrics.request('/predict', 200, seconds)
    metrics.request('/predict', 415, 1.)
    metrics.request('/x', 418, 1.)
    for n in (1, 3, 16): metrics.batch(n)
    text = metrics.text()
    buckets = dict(re.findall(r'predict_seconds_bucket\{le="(.*?)"\} (\d+)', text))
    assert buckets == {'0.005': '2', '0.01': '2', '0.025': '2', '0.05': '3', '0.1': '3', '0.25': '4', '0.5': '4', '1': '4', '2.5': '4', '5': '4', '10': '4', '+Inf': '5'}
    assert 'fastrecipes_predict_seconds_sum 20.239\n' in text and 'fastrecipes_predict_seconds_count 5\n' in text
    assert re.findall(r'batch_images_bucket\{le="(.*?)"\} (\d+)', text) == [('1', '1'), ('2', '1'), ('4', '2'), ('8', '2'), ('16', '3'), ('+Inf', '3')]
    assert 'fastrecipes_batch_images_sum 20\n' in text and '{route="/predict",status="415"} 1\n' in text and '{route="other",status="other"} 1\n' in text


def test_every_line_is_in_the_text_format():
    metrics = Metrics()
    metrics.request('/', 200, .1)
    for line in metrics.text().splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) [a-z_]+ .+|[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? \d+(\.\d+)?(e-?\d+)?', line), line


def test_more_workers_than_slots_share_the_last():
    metrics = Metrics(2)
    assert [metrics.give_slot(w) for w in 'abc'] == [0, 1, 1]
    metrics.take_back('unknown')
