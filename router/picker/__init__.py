"""The endpoint picker: a gateway (Envoy, Istio, whatever speaks Envoy's external processing) asks where a request goes,
and sends it there itself.

``server`` speaks gRPC, ``wire`` the messages, ``pick`` is one request, ``picker`` what they share, ``ledger`` what is
under way where nobody sees the end of it. How a worker is chosen, who may ask and who waits is the relay's own code
(``router.relay.course``, ``router.admission``), over the same workers and counts. Only ``server`` and ``wire`` import
gRPC, and nothing imports these two before a process that serves gateways starts.
"""
