"""Programs of this project on TPU pods: `launch` here, `entry` on every host.

Nothing of this has run on a real pod or in a real cloud. Tests compare the commands, and run the
entry as processes of one machine, of which one is killed.
"""
