"""Exporters against what they are for: a real Prometheus, a real OTLP collector, a real socket."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sowatch.model.errors import ConfigError, SowatchError
from sowatch.model.process_events import ProcessMonitorStats
from sowatch.telemetry import MetricRegistry, OtlpMetricsExporter, PrometheusExporter, Pusher, Sampler, StatsdExporter
from support.figures import Figures, Monitor, changed, timings
from support.prometheus import Prometheus
from support.receivers import free_port, grpc_collector, http_collector, serve
from support.scripted import READY

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture
def registry():
    return MetricRegistry()


@pytest.fixture
def everything(registry):
    """A registry with every metric that sowatch has."""
    sampler = Sampler(registry, version="1.2.3")
    sampler.follow_watcher(Figures(changed(loads=9, lost_queue=4), READY, timings={"tls": timings()}))
    sampler.follow_process_monitor(Monitor(ProcessMonitorStats(exec=5)))
    return registry


# ---- Prometheus ---------------------------------------------------------------------------------


def test_a_real_prometheus_scrapes_the_values_that_the_metrics_have(everything, spawn, wait_until, tmp_path):
    exporter = PrometheusExporter(everything)
    everything.counter("own.things", 'odd:"\\\n').add(3)

    def answer(request):
        return 200, *exporter.render(request.headers.get("Accept"))

    with serve(answer) as url:
        prometheus = Prometheus(spawn, wait_until, tmp_path, url.removeprefix("http://"))
        prometheus.wait_for("up", {(): 1})
        prometheus.wait_for("sowatch_watcher_matches_total", {(): 9})
        prometheus.wait_for('sowatch_watcher_lost_total{where="queue"}', {("where=queue",): 4})
        prometheus.wait_for("sowatch_own_things_total", {('odd="\\\n',): 3})
        prometheus.wait_for("sowatch_strategy_info", {("guarantee=exact", "hooks=syscall", "strategy=core"): 1})
        prometheus.wait_for('sowatch_attach_duration_seconds_bucket{le="0.1"}', {("le=0.1", "rule=tls"): 1})
        everything.counter("own.things", 'odd:"\\\n').add(4)
        prometheus.wait_for("sowatch_own_things_total", {('odd="\\\n',): 7})


def test_promtool_finds_nothing_wrong_with_the_page(everything):
    _, body = PrometheusExporter(everything).render()
    done = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, check=False)

    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, "", "")


def test_text_is_the_answer_unless_openmetrics_is_asked_for(everything):
    exporter = PrometheusExporter(everything)
    kind, text = exporter.render(None)
    other_kind, openmetrics = exporter.render(OPENMETRICS)

    assert kind.startswith("text/plain")
    assert other_kind.startswith("application/openmetrics-text")
    assert openmetrics.endswith(b"# EOF\n")
    values = [
        {(sample.name, *sorted(sample.labels.items())): sample.value for one in families for sample in one.samples}
        for families in (parse_text(text.decode()), parse_openmetrics(openmetrics.decode()))
    ]
    assert values[0] == values[1]
    assert values[0]["sowatch_watcher_matches_total",] == 9
    buckets = {
        key[1][1]: value for key, value in values[0].items() if key[0] == "sowatch_attach_duration_seconds_bucket"
    }
    assert [buckets[bound] for bound in ("0.01", "0.025", "0.1", "0.25", "10.0", "+Inf")] == [0, 0, 1, 1, 1, 1]


def test_every_family_on_the_page_is_explained(everything):
    _, body = PrometheusExporter(everything).render()

    helped = set(re.findall(r"^# HELP (\S+) \S", body.decode(), flags=re.MULTILINE))
    assert helped == set(re.findall(r"^# TYPE (\S+) ", body.decode(), flags=re.MULTILINE))
    assert len(helped) > 40


def test_tags_that_are_the_same_label_in_the_end_do_not_break_the_page(registry):
    registry.counter("c", "a.b:1").add(1)
    registry.counter("c", "a_b:1").add(1)
    registry.counter("c", "flag").add(2)

    (family,) = parse_text(PrometheusExporter(registry).render()[1].decode())
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"a_b": "1"}, 1), ({"flag": "true"}, 2)]


def test_a_metric_goes_only_where_its_options_say(registry):
    registry.counter("here", "_prometheus").add(1)
    registry.counter("there", "_statsd").add(1)
    registry.counter("everywhere").add(1)

    body = PrometheusExporter(registry).render()[1].decode()
    assert sorted(re.findall(r"^(\w+) 1.0$", body, flags=re.MULTILINE)) == [
        "sowatch_everywhere_total",
        "sowatch_here_total",
    ]


def test_a_page_that_many_ask_for_at_once_is_made_once():
    registry = MetricRegistry(clock=lambda: 100.0)
    asked = []
    registry.add_source(lambda: asked.append(1))
    exporter = PrometheusExporter(registry, max_age_s=1.0)

    with ThreadPoolExecutor(50) as scrapers:
        pages = set(scrapers.map(lambda _: exporter.render(), range(500)))

    assert len(pages) == 1
    assert len(asked) == 1


# ---- StatsD -------------------------------------------------------------------------------------


@contextlib.contextmanager
def receiving(family, address):
    with socket.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.settimeout(10)
        yield receiver


def test_statsd_gets_growth_and_values_over_udp(registry):
    registry.counter("hits", "rule:tls", "where:a|b").add(5)
    registry.gauge("files").set(-2)
    registry.histogram("seconds").observe(0.25)
    with receiving(socket.AF_INET, ("127.0.0.1", 0)) as receiver:
        exporter = StatsdExporter(registry, f"udp://127.0.0.1:{receiver.getsockname()[1]}")
        exporter.push()
        assert receiver.recv(65536).decode().split("\n") == [
            "sowatch.files:0|g",
            "sowatch.files:-2|g",
            "sowatch.hits:5|c|#rule:tls,where:a_b",
            "sowatch.seconds.count:1|c",
            "sowatch.seconds.sum:0.25|c",
        ]
        registry.counter("hits", "rule:tls", "where:a|b").add(2)
        registry.gauge("files").set(3)
        exporter.push()
        assert receiver.recv(65536).decode().split("\n") == [
            "sowatch.files:3|g",
            "sowatch.hits:2|c|#rule:tls,where:a_b",
        ]
        exporter.close()


def test_statsd_lines_fill_packets_that_fit_and_none_is_cut(registry):
    for number in range(150):
        registry.counter("a.rather.long.name.of.a.metric", f"k:{number:03d}").add(1)
    with receiving(socket.AF_INET, ("127.0.0.1", 0)) as receiver:
        exporter = StatsdExporter(registry, f"udp://127.0.0.1:{receiver.getsockname()[1]}")
        exporter.push()
        exporter.close()
        packets, lines = [], []
        while len(lines) < 150:
            packets.append(receiver.recv(65536))
            lines += packets[-1].decode().split("\n")

    assert lines == [f"sowatch.a.rather.long.name.of.a.metric:1|c|#k:{number:03d}" for number in range(150)]
    assert len(packets) == 6
    assert max(map(len, packets)) <= 1432


def test_statsd_for_servers_without_tags_puts_them_into_the_name(registry):
    registry.counter("hits", "rule:a.b").add(1)
    with receiving(socket.AF_INET, ("127.0.0.1", 0)) as receiver:
        address = f"udp://127.0.0.1:{receiver.getsockname()[1]}"
        exporter = StatsdExporter(registry, address, prefix="mine", tags="name")
        exporter.push()
        exporter.close()
        assert receiver.recv(65536) == b"mine.hits.a_b:1|c"


def test_statsd_sends_again_what_a_unix_socket_did_not_take(registry, tmp_path):
    path = tmp_path / "statsd.sock"
    registry.counter("hits").add(5)
    exporter = StatsdExporter(registry, f"unixgram://{path}")
    with pytest.raises(SowatchError, match=r"cannot send to unixgram://.*tried again"):
        exporter.push()
    registry.counter("hits").add(1)
    with receiving(socket.AF_UNIX, str(path)) as receiver:
        exporter.push()
        assert receiver.recv(65536) == b"sowatch.hits:6|c"
    path.unlink()
    registry.counter("hits").add(1)
    with pytest.raises(SowatchError, match=r"cannot send to unixgram://.*tried again"):
        exporter.push()
    with receiving(socket.AF_UNIX, str(path)) as receiver:
        exporter.push()
        assert receiver.recv(65536) == b"sowatch.hits:1|c"
    exporter.close()


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:8125", "udp://127.0.0.1", "udp://:8125", "udp://h:99999", "unixgram://x", "tcp://h:1"]
)
def test_an_address_that_statsd_cannot_use_is_refused_with_one_that_it_can(registry, address):
    with pytest.raises(ConfigError, match=r"udp://127\.0\.0\.1:8125"):
        StatsdExporter(registry, address)


def test_a_pusher_sends_at_its_start_and_at_its_end(registry):
    registry.counter("hits").add(1)
    with receiving(socket.AF_INET, ("127.0.0.1", 0)) as receiver:
        address = f"udp://127.0.0.1:{receiver.getsockname()[1]}"
        with Pusher(StatsdExporter(registry, address), interval_s=3600) as pusher:
            assert receiver.recv(65536) == b"sowatch.hits:1|c"
            registry.counter("hits").add(2)
        assert receiver.recv(65536) == b"sowatch.hits:2|c"

    assert (pusher.pushes, pusher.errors, pusher.last_error) == (2, 0, None)


def test_a_pusher_counts_what_could_not_be_sent_and_tries_again(registry, tmp_path, wait_until):
    path = tmp_path / "statsd.sock"
    registry.counter("hits").add(1)
    with Pusher(StatsdExporter(registry, f"unixgram://{path}"), interval_s=0.01) as pusher:
        Sampler(registry).follow_exporter(pusher)
        wait_until(lambda: pusher.errors)
        assert "cannot send" in (pusher.last_error or "")
        with receiving(socket.AF_UNIX, str(path)) as receiver:
            wait_until(lambda: pusher.pushes)
            assert b"sowatch.hits:1|c" in receiver.recv(65536)
    assert registry.counter("exporter.pushes", "exporter:statsd").get() >= 1


# ---- OTLP ---------------------------------------------------------------------------------------

COLLECTORS = {"http": http_collector, "grpc": grpc_collector}


def attributes(point):
    return {one.key: one.value.string_value for one in point.attributes}


@pytest.mark.parametrize("protocol", COLLECTORS)
def test_a_real_collector_gets_counters_gauges_and_histograms(everything, protocol):
    everything.counter("own.things", "a:1").add(3)
    with COLLECTORS[protocol]() as collector:
        exporter = OtlpMetricsExporter(
            everything, collector.url, protocol=protocol, headers={"X-Key": "secret"}, resource={"host.name": "box"}
        )
        exporter.push()
        exporter.close()
        exporter.close()

    (point,) = collector.points("sowatch.own.things")
    assert (attributes(point), point.as_int) == ({"a": "1"}, 3)
    (point,) = collector.points("sowatch.watcher.repaired")
    assert point.as_int == 1
    (point,) = collector.points("sowatch.attach.duration_seconds")
    assert (attributes(point), point.count, point.sum) == ({"rule": "tls"}, 1, 0.05)
    assert list(point.bucket_counts).index(1) == list(point.explicit_bounds).index(0.1)
    assert not point.HasField("min")
    resource = collector.metrics[0].resource_metrics[0].resource
    assert {"service.name": "sowatch", "host.name": "box"}.items() <= attributes(resource).items()
    assert collector.headers[0]["x-key"] == "secret"


def test_what_the_environment_says_of_the_resource_counts_more(registry, monkeypatch):
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "host.name=other,host.type=vm")
    registry.counter("c").add(1)
    with COLLECTORS["http"]() as collector:
        exporter = OtlpMetricsExporter(registry, collector.url, resource={"host.name": "box", "host.id": "7"})
        exporter.push()
        exporter.close()

    found = attributes(collector.metrics[0].resource_metrics[0].resource)
    assert {"host.name": "other", "host.type": "vm", "host.id": "7", "service.name": "sowatch"}.items() <= found.items()


@pytest.mark.parametrize("protocol", COLLECTORS)
def test_a_collector_that_refuses_or_is_gone_is_an_error_with_its_address(registry, protocol):
    registry.counter("c").add(1)
    with COLLECTORS[protocol]() as collector:
        collector.refuses = True
        exporter = OtlpMetricsExporter(registry, collector.url, protocol=protocol, timeout_s=1)
        with pytest.raises(SowatchError, match=collector.url):
            exporter.push()
        collector.refuses = False
        exporter.push()
    with pytest.raises(SowatchError, match=collector.url):
        exporter.push()
    exporter.close()

    assert [point.as_int for point in collector.points("sowatch.c")] == [1]


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:4318", "ftp://h", "http://", "http://h:99999"])
def test_an_endpoint_that_is_no_url_is_refused(registry, endpoint):
    with pytest.raises(ConfigError, match="http://HOST:4318"):
        OtlpMetricsExporter(registry, endpoint)


def test_an_unknown_protocol_is_refused_with_the_known_ones(registry):
    with pytest.raises(ConfigError, match="Use http or grpc"):
        OtlpMetricsExporter(registry, f"http://127.0.0.1:{free_port()}", protocol="smoke")


@pytest.mark.parametrize(
    ("blocked", "make", "extra"),
    [
        ("prometheus_client", "PrometheusExporter(MetricRegistry())", "sowatch[agent]"),
        ("opentelemetry", "OtlpMetricsExporter(MetricRegistry())", "sowatch[otlp]"),
        ("opentelemetry", "OtlpLogSink()", "sowatch[otlp]"),
    ],
)
def test_without_the_extra_the_error_says_which_one_to_install(blocked, make, extra):
    code = (
        f"import sys; sys.modules[{blocked!r}] = None\n"
        "from sowatch.telemetry import *\n"
        "from sowatch.model.errors import UsageError\n"
        f"try: {make}\n"
        "except UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert f"pip install '{extra}'" in done.stdout
