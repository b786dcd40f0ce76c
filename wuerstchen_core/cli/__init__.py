"""The commands of the command line: a file for each group, whose `add` says its options and what runs.

torch is imported where a command needs it, so that --help and mistakes answer at once.
"""
