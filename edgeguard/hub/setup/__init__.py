"""What an operator does before a hub can run: an authority, a broker's configuration, and the devices enrolled to it.

Nothing here runs in the hub's own process. ``pki``, ``mosquitto`` and ``tomls`` compute bytes and text, ``registry``
holds what was decided, ``files`` writes, ``enrolment`` puts them together for ``edgeguard hub init``, ``enroll`` and
``revoke``.
"""
