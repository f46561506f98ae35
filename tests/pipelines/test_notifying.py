"""A failed run reaches people: through a real HTTP server and a real SMTP server on loopback."""

from __future__ import annotations

import base64
import email.policy
import ipaddress
import json
import socketserver
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipelines import notifying
from pipelines.notifying import Notice, NotifyError, receivers, send
from pipelines.sensors import failed_run

NOTICE = Notice("stage2_valr_m failed: the loss is not finite", "Lower stage2.learning_rate", "http://host/runs/1")
TOKEN = "hf_abcdefghijklmnopqrstuvwx"


class Hook(HTTPServer):
    """Answers each request by the next of `answers`, the last one again and again."""

    def __init__(self) -> None:
        self.answers, self.got = [200], []
        super().__init__(("127.0.0.1", 0), self._Handler)

    class _Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server: Any = self.server
            server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(server.answers[min(len(server.got), len(server.answers)) - 1])
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass


class Mailbox(socketserver.ThreadingTCPServer):
    """As much of SMTP as a client needs to leave a mail; `refused` are addresses that it does not know.

    With a certificate it offers encryption, and then asks for a name and a password.
    """

    daemon_threads = True

    def __init__(self, certificate: Path | None = None) -> None:
        self.got: list[Any] = []
        self.refused: set[str] = set()
        self.read_in_plain: list[str] = []
        self.logins: list[str] = []
        self.certificate = certificate
        super().__init__(("127.0.0.1", 0), self._Handler)

    class _Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            server: Any = self.server
            encrypted = False
            self.wfile.write(b"220 test\r\n")
            while line := self.rfile.readline().decode().strip():
                if not encrypted:
                    server.read_in_plain.append(line)
                verb = line.split(":")[0].upper()
                answer = "250 ok"
                if verb == "DATA":
                    self.wfile.write(b"354 go on\r\n")
                    lines = iter(lambda: self.rfile.readline().decode(), ".\r\n")
                    server.got.append(email.message_from_string("".join(lines), policy=email.policy.default))
                elif verb == "RCPT TO" and any(name in line for name in server.refused):
                    answer = "550 nobody of that name"
                elif verb.startswith("EHLO") and server.certificate:
                    answer = "250-test\r\n250 AUTH PLAIN" if encrypted else "250-test\r\n250 STARTTLS"
                elif verb == "STARTTLS":
                    self.wfile.write(b"220 go on\r\n")
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(server.certificate)
                    try:
                        self.connection = context.wrap_socket(self.connection, server_side=True)
                    except OSError:
                        return
                    self.rfile, self.wfile, encrypted = (
                        self.connection.makefile("rb"),
                        self.connection.makefile("wb", 0),
                        True,
                    )
                    continue
                elif verb.startswith("AUTH PLAIN"):
                    server.logins.append(base64.b64decode(line.split()[2]).decode())
                    answer = "235 welcome"
                elif verb == "QUIT":
                    answer = "221 bye"
                self.wfile.write(f"{answer}\r\n".encode())


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody but a reader of this file trusts, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mail of the test")])
    now = datetime.now(UTC)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(here, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return path


def served(server: Any) -> Iterator[Any]:
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    for server in served(Hook()):
        monkeypatch.setenv("VALR_NOTIFY_WEBHOOK", f"http://127.0.0.1:{server.server_port}/services/T0/B0/very-secret")
        monkeypatch.setattr(notifying, "_SECONDS_BETWEEN_TRIES", 0)
        yield server


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mailbox]:
    for server in served(Mailbox()):
        monkeypatch.setenv("VALR_NOTIFY_SMTP", f"127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("VALR_NOTIFY_MAIL_FROM", "valr@example.org")
        monkeypatch.setenv("VALR_NOTIFY_MAIL_TO", "a@example.org, b@example.org")
        monkeypatch.setattr(notifying, "_SECONDS_BETWEEN_TRIES", 0)
        yield server


def failed(description: str | None = None, **metadata: Any) -> tuple[Any, dg.DagsterInstance]:
    """A run in which the stage `stage1_sft` failed, as the sensor sees it."""

    @dg.asset
    def stage1_sft() -> None:
        if description is None:
            raise ZeroDivisionError("division by zero")
        raise dg.Failure(description, metadata=metadata)

    instance = dg.DagsterInstance.ephemeral()
    done = dg.materialize([stage1_sft], instance=instance, raise_on_error=False)
    context = dg.build_run_status_sensor_context(
        "failed_run", done.get_run_failure_event(), instance, done.dagster_run
    ).for_run_failure()
    return context, instance


def test_the_message_is_the_stages_sentence_what_to_do_and_a_link(hook: Hook, mailbox: Mailbox) -> None:
    context, _ = failed("stage2.learning_rate=9 makes the loss grow; set it to 2e-6", exit_status=42)
    failed_run(context)
    (said,), (mail,) = hook.got, mailbox.got
    sentence, advice, link = said["text"].splitlines()
    assert sentence == "stage1_sft failed: stage2.learning_rate=9 makes the loss grow; set it to 2e-6."
    assert advice.startswith("Correct what it says, then materialize stage1_sft again")
    assert link == f"http://127.0.0.1:3000/runs/{context.dagster_run.run_id}"
    assert mail["To"] == "a@example.org, b@example.org" and mail["Subject"].strip() == sentence.rstrip(".")
    assert mail.get_content().splitlines() == [sentence, advice, link]


def test_what_no_stage_said_is_told_by_the_error(hook: Hook) -> None:
    failed_run(failed()[0])
    assert "ZeroDivisionError" in hook.got[0]["text"] and "goes on from its last checkpoint" in hook.got[0]["text"]


def test_no_secret_is_told(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALR_JUDGE_API_KEY", "planted-secret-of-a-judge")
    failed_run(failed(f"the endpoint refused planted-secret-of-a-judge and {TOKEN}")[0])
    assert "VALR_JUDGE_API_KEY" in hook.got[0]["text"]
    assert "planted" not in hook.got[0]["text"] and TOKEN not in hook.got[0]["text"]


def test_a_run_that_dagster_starts_again_is_not_told(hook: Hook) -> None:
    context, instance = failed("the worker was lost")
    instance.add_run_tags(context.dagster_run.run_id, {"dagster/will_retry": "true"})
    again = instance.get_run_by_id(context.dagster_run.run_id)
    event = context.failure_event
    told = failed_run(dg.build_run_status_sensor_context("failed_run", event, instance, again).for_run_failure())
    assert isinstance(told, dg.SkipReason) and hook.got == []


def test_nobody_is_told_without_a_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VALR_NOTIFY_WEBHOOK", "VALR_NOTIFY_SMTP"):
        monkeypatch.delenv(name, raising=False)
    told = failed_run(failed("anything")[0])
    assert "VALR_NOTIFY_WEBHOOK" in told.skip_message


def test_a_receiver_that_stumbles_is_told_again(hook: Hook) -> None:
    hook.answers = [503, 429, 200]
    send(NOTICE, receivers())
    assert len(hook.got) == 3


def test_one_that_refuses_is_named_without_its_address_and_the_other_is_told(hook: Hook, mailbox: Mailbox) -> None:
    hook.answers = [404]
    with pytest.raises(NotifyError, match=r"VALR_NOTIFY_WEBHOOK answered 404") as error:
        send(NOTICE, receivers())
    assert "very-secret" not in str(error.value)
    assert len(hook.got) == 1 and "the loss is not finite" in mailbox.got[0]["Subject"]


def test_markup_of_the_chat_is_escaped(hook: Hook) -> None:
    send(Notice("<!channel> a & b", "x", "http://h"), receivers())
    assert hook.got[0]["text"].startswith("&lt;!channel&gt; a &amp; b.")


def test_a_mail_to_nobody_names_the_variable(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox.refused = {"a@example.org", "b@example.org"}
    with pytest.raises(NotifyError, match="VALR_NOTIFY_MAIL_TO"):
        send(NOTICE, receivers())
    monkeypatch.delenv("VALR_NOTIFY_MAIL_TO")
    with pytest.raises(NotifyError, match="VALR_NOTIFY_MAIL_TO"):
        receivers()


def test_no_password_goes_over_a_connection_without_encryption(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALR_NOTIFY_SMTP_USER", "valr")
    monkeypatch.setenv("VALR_NOTIFY_SMTP_PASSWORD", "planted-password")
    with pytest.raises(NotifyError, match="no encryption") as error:
        send(NOTICE, receivers())
    assert mailbox.got == [] and "planted" not in str(error.value)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_password_is_told_only_to_a_server_that_shows_a_trusted_certificate(
    trusted: bool, mailbox: Mailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mailbox.certificate = self_signed(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(mailbox.certificate))
    monkeypatch.setenv("VALR_NOTIFY_SMTP_USER", "valr")
    monkeypatch.setenv("VALR_NOTIFY_SMTP_PASSWORD", "planted-password")
    if trusted:
        send(NOTICE, receivers())
        assert mailbox.logins == ["\0valr\0planted-password"] and len(mailbox.got) == 1
    else:
        with pytest.raises(NotifyError, match="CERTIFICATE_VERIFY_FAILED"):
            send(NOTICE, receivers())
        assert mailbox.logins == [] and mailbox.got == []
    plain = {line.split()[0] for line in mailbox.read_in_plain}
    assert plain <= {"ehlo", "STARTTLS"}, "nothing else before the connection is encrypted"


@pytest.mark.parametrize("address", ["nowhere", "http://127.0.0.1:9/x"])
def test_a_webhook_that_is_none_is_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifying, "_SECONDS_BETWEEN_TRIES", 0)
    monkeypatch.setenv("VALR_NOTIFY_WEBHOOK", address)
    with pytest.raises(NotifyError, match="VALR_NOTIFY_WEBHOOK"):
        send(NOTICE, receivers())
