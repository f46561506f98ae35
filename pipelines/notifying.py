"""Telling people: one sentence, what to do, and a link, by a webhook as Slack's and by mail.

In: a `Notice`, and receivers from the environment: ``VALR_NOTIFY_WEBHOOK`` (an address that takes ``{"text": ...}``);
``VALR_NOTIFY_SMTP`` (host:port), ``VALR_NOTIFY_MAIL_FROM``, ``VALR_NOTIFY_MAIL_TO`` (addresses, commas between them),
and where the server wants it ``VALR_NOTIFY_SMTP_USER`` with ``VALR_NOTIFY_SMTP_PASSWORD``.
Always: no secret in a message, in an error or in a log; a password only over an encrypted connection; a receiver that
fails keeps no other from being told.
"""

import json
import os
import smtplib
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import EmailMessage

from valr_ops.recipe.secrets import redacted

_SECONDS = 10.0
_TRIES = 3
_SECONDS_BETWEEN_TRIES = 1.0
_CHARACTERS = 1500


class NotifyError(RuntimeError):
    """A receiver that was not told: which, why, and the variable to correct."""


@dataclass(frozen=True)
class Notice:
    """What people are told."""

    sentence: str
    """What happened."""
    advice: str
    """What to do."""
    link: str
    """Where to read more."""

    @property
    def subject(self) -> str:
        """The sentence's first line, cut for a mail's subject."""
        return redacted(self.sentence).splitlines()[0][:150]

    @property
    def text(self) -> str:
        """All of it, without any secret."""
        said = " ".join(redacted(self.sentence).split())
        if len(said) > _CHARACTERS:
            said = f"{said[:_CHARACTERS]} ..."
        return f"{said.rstrip('.')}.\n{redacted(self.advice).rstrip('.')}.\n{redacted(self.link)}"


@dataclass(frozen=True)
class Receiver:
    """Who is told, and how."""

    name: str
    tell: Callable[[Notice], None]


def receivers() -> list[Receiver]:
    """Those that the environment names.

    Raises:
        NotifyError: a mail server without the addresses of sender and receivers.
    """
    found = []
    if webhook := os.environ.get("VALR_NOTIFY_WEBHOOK"):
        found.append(Receiver("the webhook", lambda notice: _post(webhook, notice)))
    if server := os.environ.get("VALR_NOTIFY_SMTP"):
        sender, people = (os.environ.get(f"VALR_NOTIFY_MAIL_{one}", "") for one in ("FROM", "TO"))
        if not sender or not people:
            raise NotifyError("VALR_NOTIFY_SMTP needs VALR_NOTIFY_MAIL_FROM and VALR_NOTIFY_MAIL_TO beside it")
        found.append(Receiver("the mail server", lambda notice: _mail(server, sender, people, notice)))
    return found


def send(notice: Notice, to: Sequence[Receiver]) -> None:
    """Tell all of them.

    Raises:
        NotifyError: some were not told, after three tries each; all others were.
    """
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

    tries = Retrying(
        retry=retry_if_exception_type(_Unreachable),
        stop=stop_after_attempt(_TRIES),
        wait=wait_fixed(_SECONDS_BETWEEN_TRIES),
        reraise=True,
    )
    failed = []
    for receiver in to:
        try:
            tries(receiver.tell, notice)
        except NotifyError as error:
            failed.append(str(error))
    if failed:
        raise NotifyError("; ".join(failed))


class _Unreachable(NotifyError):
    """What may be over in a second."""


def _post(webhook: str, notice: Notice) -> None:
    # Slack reads these three as markup.
    text = notice.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    what = "the webhook of VALR_NOTIFY_WEBHOOK"
    try:
        request = urllib.request.Request(
            webhook, json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=_SECONDS).close()
    except urllib.error.HTTPError as error:
        kind = _Unreachable if error.code == 429 or error.code >= 500 else NotifyError
        raise kind(f"{what} answered {error.code}; make a new one in the chat, or correct the variable") from None
    except OSError as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        raise _Unreachable(
            f"{what} can't be reached ({redacted(str(why))}); correct it, or look at the network"
        ) from None
    except ValueError:
        raise NotifyError(f"{what} is no address; write https://...") from None


def _mail(server: str, sender: str, people: str, notice: Notice) -> None:
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal():
        raise NotifyError(f"VALR_NOTIFY_SMTP={server} is no host:port, such as mail.example.org:587")
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = notice.subject, sender, people
    message.set_content(notice.text)
    user = os.environ.get("VALR_NOTIFY_SMTP_USER")
    try:
        with smtplib.SMTP(host, int(port), timeout=_SECONDS) as connection:
            if user:
                connection.starttls(context=ssl.create_default_context())
                connection.login(user, os.environ.get("VALR_NOTIFY_SMTP_PASSWORD", ""))
            connection.send_message(message)
    except smtplib.SMTPAuthenticationError:
        raise NotifyError(
            f"{server} refused VALR_NOTIFY_SMTP_USER={user}; correct it or VALR_NOTIFY_SMTP_PASSWORD"
        ) from None
    except smtplib.SMTPNotSupportedError as error:
        raise NotifyError(f"{server} offers no encryption, without which no password is sent ({error})") from None
    except smtplib.SMTPResponseException as error:
        kind = _Unreachable if 400 <= error.smtp_code < 500 else NotifyError
        words = error.smtp_error if isinstance(error.smtp_error, str) else error.smtp_error.decode(errors="replace")
        raise kind(
            f"{server} refused the mail ({error.smtp_code} {redacted(words)}); correct VALR_NOTIFY_MAIL_..."
        ) from None
    except smtplib.SMTPRecipientsRefused:
        raise NotifyError(f"{server} takes no mail for {people}; correct VALR_NOTIFY_MAIL_TO") from None
    except (OSError, smtplib.SMTPException) as error:
        raise _Unreachable(f"{server} can't be reached ({redacted(str(error))}); correct VALR_NOTIFY_SMTP") from None
