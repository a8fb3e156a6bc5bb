"""The command ``vargpt-rl``: a tree of subcommands over the programs of this project.

Modules here import none of the libraries that take seconds to load (torch, ray, hydra): ``--help`` and completion must
be instant. A subcommand imports its program when it runs.
"""
