"""The hub: takes the devices' reports, adds up their evidence, opens cases, has models repaired, and rolls them out.

Pure modules decide: what a message is (``ingest``, ``limits``), what counts say (``evidence``, ``excess``, ``drift``,
``trust``, ``policy``), what becomes of a case (``cases``) and of a release (``rollout``). Thin shells do the rest: the
connection (``link``, ``listener``, ``workers``), the database (``store``, ``casebook``, ``retention``), long work
(``jobs``, ``worker``), what is said to devices and people (``commands``, ``notify``, ``web``, ``api``), and the loop
that moves it all on (``director``). ``setup`` makes a broker and enrols devices. Inspecting and repairing runs in child
processes, so that the hub itself never imports a training framework.
"""
