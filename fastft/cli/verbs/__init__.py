"""Verbs of the command line: a file each, named as the verb is (verify_resume: verify-resume), with a function
``run`` or a Typer ``app``. The first line of its docstring is what ``fastft --help`` says of it.
"""
