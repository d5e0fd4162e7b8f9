"""The server as a launchd daemon on a Mac: what `vecinfer service` does.

machine     everything that touches the system: processes, accounts, owners, HTTP (tests replace it)
places      where things lie under one prefix
plist       the two property lists, and how an installed one is read back
rules       what a property list of ours must obey, checked on any system
launchctl   the commands, waiting and explained errors
settings    the config.yaml that the daemon runs with
steps       things to do that can also describe themselves: a dry run prints what a real run does
waiting     steps that check before and after
install, uninstall, status, tail   one action each
"""
