"""The interactive chat on a terminal: reading a message, running /commands, showing the reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from rich.console import Console

from llmkit.cli.conversation import SETTINGS, Conversation
from llmkit.cli.rag_output import printable
from llmkit.cli.terminal import state_dir, write_markdown
from llmkit.errors import ContextOverflow, LLMKitError, UsageError
from llmkit.llm.adapters import NONE
from llmkit.llm.outputs import Stream

FENCE = '"""'
TAKE_ARGUMENTS = ("/system", "/set", "/adapter", "/save", "/load")
HELP = """\
/system [TEXT]       show the system message, or set it (/system none removes it)
/set [NAME VALUE]    show the settings, or change one: temperature, top_p, max_tokens, seed, verbose, ...
/adapter [NAME|none] show the adapters, or take another one for the replies to come
/retry               another reply to your last message
/undo                forget your last message and the reply
/save FILE           append the chat to FILE as one training row (JSONL)
/load FILE           go on with the last chat in FILE
/history             show the chat so far
/clear               forget the chat, keep the settings
/bye                 leave (also Ctrl-D)
Enter sends; Esc Enter, or text between \"\"\" and \"\"\", makes several lines; Ctrl-C stops a reply and keeps what was said."""


class ChatCompleter(Completer):
    """Completes /commands, the names after /set and /adapter, and files after /save and /load."""

    def __init__(self, commands: Iterable[str], adapters: Iterable[str]) -> None:
        self._commands = sorted(commands)
        self._names = {"/set": [*SETTINGS, "verbose"], "/adapter": [*adapters, NONE]}
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        command, space, argument = text.partition(" ")
        if not space:
            yield from (Completion(name, -len(text)) for name in self._commands if name.startswith(text))
        elif command in self._names and " " not in argument:
            yield from (Completion(name, -len(argument)) for name in self._names[command] if name.startswith(argument))
        elif command in ("/save", "/load"):
            yield from self._paths.get_completions(Document(argument, len(argument)), complete_event)


def key_bindings() -> KeyBindings:
    """Enter sends, except inside an open block of triple quotes; Esc Enter makes a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        text = event.current_buffer.text.strip()
        if text.startswith(FENCE) and (len(text) < 2 * len(FENCE) or not text.endswith(FENCE)):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class Repl:
    """Reads messages until the person leaves."""

    def __init__(self, conversation: Conversation, verbose: bool) -> None:
        self.conversation = conversation
        self.verbose = verbose
        self.console = Console()
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.console.print(HELP, markup=False, highlight=False),
            "/system": self._system,
            "/set": self._set,
            "/adapter": lambda name: self._say(self.conversation.choose_adapter(name)),
            "/retry": lambda _: self._answer(self.conversation.retry),
            "/undo": lambda _: self._say(f"forgot: {self.conversation.undo()}"),
            "/save": self._save,
            "/load": self._load,
            "/history": lambda _: self._history(),
            "/clear": lambda _: self._clear(),
            "/bye": lambda _: None,
        }
        self.session: PromptSession[str] = PromptSession(
            history=FileHistory(str(state_dir() / "chat_history")),
            completer=ChatCompleter(self.commands, self.conversation.llm.adapters),
            complete_while_typing=False,
            key_bindings=key_bindings(),
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: "." * (width - 1) + " ",
            placeholder=lambda: HTML("<ansigray>a message, or /help</ansigray>") if not get_app().current_buffer.text else "",
        )

    def run(self) -> int:
        """The loop; returns the exit code."""
        self._say(repr(self.conversation.llm)[1:-1])
        self._say(f"{self.conversation.describe()} (/set changes it, /help, /bye)")
        while True:
            try:
                text = self.session.prompt(">>> ").strip()
                interrupted = self._interrupt_came_with_enter()
            except KeyboardInterrupt:
                self._say("Ctrl-C stops a reply; /bye or Ctrl-D leaves.")
                continue
            except EOFError:
                return 0
            if interrupted:
                self._say("(interrupted; nothing was sent, arrow up has it)")
                continue
            command = text.split(maxsplit=1)[0] if text else ""
            if text == "/bye":
                return 0
            try:
                self._handle(text, command)
            except KeyboardInterrupt:
                self._say("(interrupted)")
            except ContextOverflow as error:
                self._fail(f"{error} /undo forgets the last turn, /clear the whole chat.")
            except (LLMKitError, OSError) as error:
                self._fail(error)

    def _interrupt_came_with_enter(self) -> bool:
        """Whether Ctrl-C was pressed so soon after Enter that the terminal took it for a key, which would wait for the next prompt."""
        source = self.session.input
        with source.raw_mode():
            keys = [*get_typeahead(source), *source.read_keys()]
        others = [press for press in keys if press.key != Keys.ControlC]
        store_typeahead(source, others)
        return len(others) < len(keys)

    def _handle(self, text: str, command: str) -> None:
        if not text:
            return
        if command in self.commands:
            argument = text[len(command) :].strip()
            if argument and command not in TAKE_ARGUMENTS:
                raise UsageError(f"{command} takes no {argument!r}. Say {command} alone.")
            self.commands[command](argument)
        elif command.startswith("/") and "/" not in command[1:]:
            near = get_close_matches(command, self.commands, n=1)
            raise UsageError(f"{command} is not a command. {f'Did you mean {near[0]}?' if near else '/help lists them.'}")
        else:
            if text.startswith(FENCE) and text.endswith(FENCE) and len(text) >= 2 * len(FENCE):
                text = text[len(FENCE) : -len(FENCE)].strip("\n")
            self._answer(lambda: self.conversation.ask(text))

    def _answer(self, start: Callable[[], Stream]) -> None:
        completion = write_markdown(start(), self.console)
        self.conversation.answered(completion)
        if completion.finish_reason == "length" and completion.usage.total_tokens == self.conversation.llm.ctx_size:
            self._say(
                f"(the context of {completion.usage.total_tokens} tokens is full; /undo forgets the last turn, /clear the whole chat)"
            )
        elif completion.finish_reason == "length":
            self._say(f"(stopped after {completion.usage.completion_tokens} tokens; /set max_tokens allows more)")
        elif completion.finish_reason == "interrupted":
            self._say("(interrupted; what was said is kept)")
        if self.conversation.grounding is not None:
            self._say(printable("\n".join(self.conversation.grounding.proof(completion.text))))
        if self.verbose:
            self._say(completion.summary())

    def _fail(self, error: object) -> None:
        self.console.print(f"error: {error}", style="red", markup=False, highlight=False)

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "none" else text
        self._say(f"system: {self.conversation.system or '(none)'}")

    def _set(self, text: str) -> None:
        name, _, value = text.replace("=", " ", 1).partition(" ")
        if name == "verbose":
            if value.strip() not in ("", "on", "off"):
                raise UsageError(f"verbose cannot be {value.strip()!r}. Say on or off.")
            self.verbose = value.strip() != "off"
        elif name:
            if not value.strip():
                raise UsageError(f"/set {name} needs a value. Give a number, or `default`.")
            self.conversation.set(name, value.strip())
        self._say(f"{self.conversation.describe()}, verbose {'on' if self.verbose else 'off'}")

    def _save(self, file: str) -> None:
        if not file:
            raise UsageError("/save needs a file name, as in /save chat.jsonl.")
        rows = self.conversation.save(file)
        self._say(f"saved as row {rows} of {file}")

    def _load(self, file: str) -> None:
        if not file:
            raise UsageError("/load needs a file name, as in /load chat.jsonl.")
        self.conversation.load(file)
        self._history()

    def _history(self) -> None:
        if not self.conversation.messages:
            self._say("(nothing was said yet)")
        for message in self.conversation.messages:
            self._say(f"{message['role']}:")
            self.console.print(str(message["content"]), markup=False, highlight=False)

    def _clear(self) -> None:
        self.conversation.turns.clear()
        self._say("the chat is forgotten")
