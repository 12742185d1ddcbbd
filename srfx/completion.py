"""A completion script for shells, from the parser of the command line."""

from __future__ import annotations

import argparse

_SCRIPT = """\
# bash:  {prog} completion > ~/.local/share/bash-completion/completions/{prog}
# zsh:   autoload -U bashcompinit && bashcompinit, then source this file
_{prog}() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" options=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=()
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
  esac
}}
complete -o default -F _{prog} {prog}"""


def bash(parser: argparse.ArgumentParser) -> str:
    """Commands, their options, and files for everything else.

    Example:
        >>> parser = argparse.ArgumentParser(prog="tool")
        >>> _ = parser.add_subparsers().add_parser("run").add_argument("--fast", action="store_true")
        >>> "--fast --help" in bash(parser)
        True
    """
    commands = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    cases = [f'    {name}) options="{" ".join(_options(command))}" ;;' for name, command in commands.items()]
    top = " ".join([*commands, *_options(parser)])
    return _SCRIPT.format(prog=parser.prog, commands=top, cases="\n".join(cases))


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return sorted(o for action in parser._actions for o in action.option_strings if o.startswith("--"))
