"""TLS, certificates of both sides and tokens over real connections: what works, and one sentence for each that does not."""

import asyncio
import json
import subprocess
import threading

import pytest
from grpc_health.v1 import health_pb2

from rollout import bridge_pb2 as pb
from rollout.channel import METHODS, grpc
from rollout.client import RolloutClient
from rollout.listener import Limits, listen_at
from rollout.security import Security
from rollout.stub import BridgeError, Stub
from sqlrl_jax.config import BridgeConfig
from tests.integration.bridge_helpers import DEADLINE, ROOT, SAMPLING, key, push, service, tasks, weights

pytestmark = pytest.mark.timeout(180)
TOKEN, OTHER = "a token of the right length".replace(" ", "-"), "another token of good length".replace(" ", "-")


@pytest.fixture(scope="module")
def listening():
    """Starts a server in this process that answers Status; returns its address."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    started = []

    async def status(request, context):
        return pb.StatusReply(state=pb.EMPTY)

    async def nothing(request, context):
        raise AssertionError("a call without the token came through")

    async def start(security):
        functions = dict.fromkeys(METHODS, nothing) | {"Status": status}
        at = await listen_at(functions, "127.0.0.1:0", security, Limits())
        started.append(at)
        return at.address

    def run(security):
        return asyncio.run_coroutine_threadsafe(start(security), loop).result(DEADLINE)

    yield run
    for at in started:
        asyncio.run_coroutine_threadsafe(at.server.stop(None), loop).result(DEADLINE)
    loop.call_soon_threadsafe(loop.stop)


# The service's certificate and authority, the learner's, and what the learner reads.
TLS = [
    (("service", ""), ("", "ca"), None),
    (("service", "ca"), ("learner", "ca"), None),
    (("service", ""), ("learner", "ca"), None),
    (("service", ""), ("", "other"), "its certificate is not signed by bridge.tls_ca"),
    (("stranger", ""), ("", "ca"), "its certificate is not signed by bridge.tls_ca"),
    (("expired", ""), ("", "ca"), "its certificate has expired"),
    (("elsewhere", ""), ("", "ca"), "its certificate is for another name"),
    (("service", ""), ("", ""), "it speaks TLS and this side does not; set bridge.tls_ca"),
    (("", ""), ("", "ca"), "it does not speak TLS; set its bridge.tls_cert"),
    (("service", "ca"), ("", "ca"), "it asks for a certificate; set bridge.tls_cert and bridge.tls_key"),
    (("service", "ca"), ("stranger", "ca"), "it does not accept the certificate in bridge.tls_cert"),
    (("service", "ca"), ("expired", "ca"), "it does not accept the certificate in bridge.tls_cert"),
]


@pytest.mark.parametrize(("ours", "theirs", "said"), TLS, ids=range(len(TLS)))
def test_who_does_not_trust_whom_is_one_sentence(certificates, listening, ours, theirs, said):
    address = listening(Security.load(BridgeConfig(**certificates.settings(*ours))))
    with Stub(address, Security.load(BridgeConfig(**certificates.settings(*theirs)))) as stub:
        trouble = stub.trouble()
        if said is None:
            assert trouble is None
        else:
            assert trouble.unwelcome
            assert str(trouble).startswith(f"rollout service {address}: {said}")
            assert "\n" not in str(trouble)


def test_a_service_behind_a_name_shows_the_names_certificate(certificates, listening):
    address = listening(Security.load(BridgeConfig(**certificates.settings("elsewhere"))))
    learner = Security.load(BridgeConfig(**certificates.settings(ca="ca")))
    client = RolloutClient(["dns:///elsewhere.test:8700"], security=learner, lookup=lambda name, port: [address])
    assert client.wait_ready(DEADLINE) == []
    client.close()


@pytest.mark.parametrize(
    ("token", "said"),
    [(TOKEN, None), ("", "this service asks for a token"), (OTHER, "this service has another token")],
)
def test_a_token_is_asked_for(listening, token, said):
    address = listening(Security(token=TOKEN))
    with Stub(address, Security(token=token)) as stub:
        trouble = stub.trouble()
        assert (trouble is None) == (said is None)
        assert said is None or (said in str(trouble) and trouble.unwelcome)
        assert TOKEN not in str(trouble)
        assert stub.healthy(), "whether it is there is no secret"
    client = RolloutClient([address], security=Security(token=token))
    if said:
        with pytest.raises(BridgeError, match=said):
            client.wait_ready(DEADLINE)  # at once: waiting mends nothing
    else:
        assert client.wait_ready(DEADLINE) == []
    client.close()


def test_no_method_is_open_without_the_token(listening):
    address = listening(Security(token=TOKEN))

    def code(path, streams_in, streams_out):
        kinds = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }
        try:
            answer = kinds[streams_in, streams_out](path)(iter([b""]) if streams_in else b"", timeout=DEADLINE)
            return list(answer) if streams_out else answer
        except grpc.RpcError as error:
            return error.code()

    with grpc.insecure_channel(address) as channel:
        for method in METHODS.values():
            assert code(method.path, method.streams_in, method.streams_out) is grpc.StatusCode.UNAUTHENTICATED
        reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        assert code(reflection, True, True) is grpc.StatusCode.UNAUTHENTICATED
        healthy = health_pb2.HealthCheckResponse.FromString(code("/grpc.health.v1.Health/Check", False, False))
        assert healthy.status == health_pb2.HealthCheckResponse.SERVING


def test_weights_and_episodes_go_over_a_protected_bridge(certificates, tmp_path, caplog):
    (tmp_path / "token").write_text(TOKEN)
    ours = certificates.settings("service", "ca") | {"token_file": str(tmp_path / "token")}
    theirs = certificates.settings("learner", "ca") | {"token_file": str(tmp_path / "token")}
    security = Security.load(BridgeConfig(**theirs))
    process = service(tmp_path, "--listen", "0.0.0.0:0", "--bridge", json.dumps(ours), security=security)
    try:
        port = process.start().rpartition(":")[2]
        client = RolloutClient([f"127.0.0.1:{port}"], security=security)
        client.wait_ready(DEADLINE)
        push(client.stubs[0], key(1), weights())
        assert not caplog.records, "the data port takes the same certificates"
        client.identify("run", 1)
        assert len(client.rollout(tasks(2), 2, SAMPLING, version=1, seed=0, max_turns=5)) == 4
        client.close()
        for intruder in (Security(), Security.load(BridgeConfig(**certificates.settings("learner", "ca")))):
            with Stub(f"127.0.0.1:{port}", intruder) as stub:
                assert stub.trouble().unwelcome
    finally:
        process.stop()
    assert TOKEN not in (tmp_path / "service.log").read_text()


def test_a_service_for_other_machines_does_not_start_unprotected(tmp_path):
    process = service(tmp_path, "--listen", "0.0.0.0:0")
    with pytest.raises(Exception, match=r"set bridge\.tls_cert and bridge\.tls_key"):
        process.start()


def test_the_certificate_that_the_guide_makes_will_do(listening, tmp_path):
    """docs/bridge.md: one that is its own authority, made by one command."""
    guide = (ROOT / "docs" / "bridge.md").read_text()
    lines = [line.strip() for line in guide.splitlines() if line.startswith("    openssl ")]
    assert len(lines) == 2
    for line in lines:
        local = line.replace("DNS:gpu1,DNS:gpu2", "DNS:localhost,IP:127.0.0.1")
        subprocess.run(["bash", "-c", local], cwd=tmp_path, check=True, capture_output=True)
    files = {name: str(tmp_path / file) for name, file in (("tls_cert", "gpu.pem"), ("tls_key", "gpu.key"))}
    token = {"token_file": str(tmp_path / "token")}
    serving = Security.load(BridgeConfig(**files, **token))
    serving.require_allowed("0.0.0.0:8700")
    with Stub(listening(serving), Security.load(BridgeConfig(tls_ca=files["tls_cert"], **token))) as stub:
        assert stub.trouble() is None
