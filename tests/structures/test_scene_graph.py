from reldn_d2.structures.scene_graph import SceneGraph


def test_scene_graph_repr_is_one_short_line():
    names = dict(thing_classes=["person"] * 1000, predicate_classes=["rides"] * 1000)
    graph = SceneGraph(
        *(7, [[0, 0, 2, 2], [1, 1, 3, 3]], [0, 1], [[0, 1]], [3]), file_name="a/b.jpg", **names
    )
    assert repr(graph) == "<SceneGraph of a/b.jpg: 2 entities, 1 relations>"
    assert repr(SceneGraph.empty(7)) == "<SceneGraph of 7: 0 entities, 0 relations>"
    assert repr(SceneGraph.empty()) == "<SceneGraph: 0 entities, 0 relations>"
