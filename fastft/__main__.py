from fastft.cli import command

command()
