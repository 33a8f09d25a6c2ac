"""The protocols in plain loops, written straight from their rules (docs/evaluation.md)."""

import math

NAN = float("nan")
KINDS = {"relationship": "rel", "phrase": "phr"}


def ranked(case, k=None, limit=None, considered=lambda case, triplet: True):
    """An image's triplets by score; each pair keeps k, the image ``limit``."""
    kept, times = [], {}
    for triplet in sorted(case.triplets, key=lambda t: -t[3]):
        if not considered(case, triplet):
            continue
        pair = triplet[:2]
        times[pair] = times.get(pair, 0) + 1
        if k is None or times[pair] <= k:
            kept.append(triplet)
    return kept[:limit] if limit else kept


def label_of(case, triplet):
    return case.classes[triplet[0]], triplet[2], case.classes[triplet[1]]


def same_label(case, triplet):
    """Indices of the image's relations with the triplet's three labels."""
    wanted = label_of(case, triplet)
    return [i for i, label in enumerate(case.gt_labels()) if label == wanted]


def percent(hits, total):
    return 100 * hits / total if total else NAN


def mean(values):
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else NAN


def one_to_one(case, triplets, kind):
    """Indices of the relations that are found when each triplet takes one that is free."""
    taken = set()
    for triplet in triplets:
        best, best_overlap = None, 0.0
        for index in same_label(case, triplet):
            overlap = case.overlap(kind, triplet, case.relations[index])
            if index not in taken and overlap >= 0.5 and overlap > best_overlap:
                best, best_overlap = index, overlap
        if best is not None:
            taken.add(best)
    return taken


def many_to_many(case, triplets):
    """Indices of the relations that any of the triplets matches."""
    return {
        index
        for triplet in triplets
        for index in same_label(case, triplet)
        if case.overlap("relationship", triplet, case.relations[index]) >= 0.5
    }


def pooled(cases, find, counted=lambda label: True):
    hits = total = 0
    for case in cases:
        labels = case.gt_labels()
        total += sum(counted(label) for label in labels)
        hits += sum(counted(labels[index]) for index in find(case))
    return percent(hits, total)


def lu2016(cases, ks, recall_at, task="sgdet", seen=None):
    results = {}
    kinds = {"relationship": "relationship", "phrase": "phrase"}
    if task == "prdcls":
        kinds = {"predicate": "relationship"}
    for k in ks:
        metrics = results[f"lu2016_{task}_k{k}" if k else f"lu2016_{task}"] = {}
        for name, kind in kinds.items():
            for n in recall_at:

                def find(case, n=n, kind=kind, k=k):
                    return one_to_one(case, ranked(case, k, n), kind)

                metrics[f"{name} R@{n}"] = pooled(cases, find)
                if seen is not None:
                    unseen = pooled(cases, find, lambda label: label not in seen)
                    metrics[f"zero-shot {name} R@{n}"] = unseen
    return results


def grouped(cases, num_predicates, training=None, thresholds=()):
    """Head, body and tail: lists of the predicates that the cases have; None if unknown."""
    counts = [count(cases, p) for p in range(num_predicates)]
    frequency = counts if training is None else training
    order = sorted(range(num_predicates), key=lambda p: -frequency[p])
    present = [p for p in order if counts[p]]
    if not thresholds:
        size, more = divmod(len(present), 3)
        ends = [size + (more > 0), 2 * size + (more > 0) + (more > 1)]
        return {
            "head": present[: ends[0]],
            "body": present[slice(*ends)],
            "tail": present[ends[1] :],
        }
    if training is None:
        return None
    groups = {"head": [], "body": [], "tail": []}
    for p in present:
        high, low = training[p] >= thresholds[0], training[p] < thresholds[1]
        groups["head" if high else "tail" if low else "body"].append(p)
    return groups


def motifs(
    cases, ks, recall_at, num_predicates, task="sgdet", seen=None, training=None, thresholds=()
):
    results = {}
    groups_of_predicates = grouped(cases, num_predicates, training, thresholds)
    names = {1: "graph_constraint", None: "no_constraint"}
    for k in ks:
        metrics = results[f"motifs_{task}_{names.get(k, f'k{k}')}"] = {}
        relative, relative_of = [], [[] for _ in range(num_predicates)]
        for case in cases:
            labels = case.gt_labels()
            found = many_to_many(case, ranked(case, k)[: len(labels)])
            if labels:
                relative.append(percent(len(found), len(labels)))
            for p in range(num_predicates):
                own = {i for i, label in enumerate(labels) if label[1] == p}
                if own:
                    relative_of[p].append(percent(len(found & own), len(own)))
        metrics["relative R"] = mean(relative)
        metrics["relative mR"] = mean([mean(values) for values in relative_of])
        for n in recall_at:
            all_, unseen, information = [], [], []
            of_predicate = [[] for _ in range(num_predicates)]
            for case in cases:
                found = many_to_many(case, ranked(case, k, n))
                labels = case.gt_labels()
                if training is not None:
                    share = [(training[p] + 1) / sum(c + 1 for c in training) for _, p, _ in labels]
                    bits = [-math.log2(x) for x in share]
                    if sum(bits):
                        information.append(percent(sum(bits[i] for i in found), sum(bits)))
                groups = [(all_, range(len(labels)))]
                for p in range(num_predicates):
                    own = [i for i, label in enumerate(labels) if label[1] == p]
                    groups.append((of_predicate[p], own))
                if seen is not None:
                    own = [i for i, label in enumerate(labels) if label not in seen]
                    groups.append((unseen, own))
                for values, members in groups:
                    if len(members):
                        values.append(percent(len(found & set(members)), len(members)))
            metrics[f"R@{n}"] = mean(all_)
            recall = metrics[f"R@{n}"]
            of_predicate = [mean(values) for values in of_predicate]
            mean_recall = metrics[f"mR@{n}"] = mean(of_predicate)
            metrics[f"F1@{n}"] = 0.0  # the harmonic mean: 1 / (mean of the reciprocals)
            if math.isnan(recall) or recall and mean_recall:
                metrics[f"F1@{n}"] = 1 / ((1 / recall + 1 / mean_recall) / 2)
            if seen is not None:
                metrics[f"zR@{n}"] = mean(unseen)
            if training is not None:
                metrics[f"information R@{n}"] = mean(information)
            for name, members in (groups_of_predicates or {}).items():
                metrics[f"{name} mR@{n}"] = mean([of_predicate[p] for p in members])
    return results


def tested(cases, kind, k, limit, strict, considered=lambda case, triplet: True):
    """(score, predicate, rank in its image, true positive) of all triplets, by score."""
    detections = []
    for image, case in enumerate(cases):
        for rank, triplet in enumerate(ranked(case, k, limit, considered)):
            best, best_overlap = None, 0.0
            for index in same_label(case, triplet):
                overlap = case.overlap(kind, triplet, case.relations[index])
                if overlap > best_overlap:
                    best, best_overlap = (image, index), overlap
            enough = best_overlap > 0.5 if strict else best_overlap >= 0.5
            detections.append((triplet[3], triplet[2], rank, best if enough else None))
    taken, result = set(), []
    for score, predicate, rank, match in sorted(detections, key=lambda d: -d[0]):
        result.append((score, predicate, rank, match is not None and match not in taken))
        taken.add(match)
    return result


def area(hits, total):
    """Area under the precision envelope over all recall points; hits in order of score."""
    if total == 0:
        return NAN
    curve, found = [], 0
    for rank, hit in enumerate(hits, 1):
        found += hit
        curve.append((found / total, found / rank))
    result, previous = 0.0, 0.0
    for recall in sorted({r for r, _ in curve}):
        result += (recall - previous) * max(p for r, p in curve if r >= recall)
        previous = recall
    return 100 * result


def count(cases, predicate):
    return sum(label[1] == predicate for case in cases for label in case.gt_labels())


def precisions(cases, detections, num_predicates):
    return [
        area([d[3] for d in detections if d[1] == p], count(cases, p))
        for p in range(num_predicates)
    ]


def judged_by_code(case, triplet):
    """As the challenge's code: a verified class that no relation has is negative."""
    classes = {case.classes[triplet[0]], case.classes[triplet[1]]}
    related = {case.gt_classes[end] for s, o, _ in case.relations for end in (s, o)}
    if any(c in case.verified and c not in related for c in classes):
        return True
    return all(c in related for c in classes)


def judged_by_text(case, triplet):
    """As the challenge's text: classes of boxes are positive, classes verified absent negative."""
    classes = {case.classes[triplet[0]], case.classes[triplet[1]]}
    annotated = set(case.gt_classes)
    if any(case.verified.get(c) == 0 and c not in annotated for c in classes):
        return True
    return all(c in annotated or c in case.verified for c in classes)


def openimages(cases, ks, recall_at, names, task="sgdet", name="openimages"):
    results = {}
    judged = {"openimages": judged_by_code, "openimages_text": judged_by_text}[name]
    total = sum(len(case.relations) for case in cases)
    for k in ks:
        metrics = results[f"{name}_{task}_k{k}" if k else f"{name}_{task}"] = {}
        found = {kind: tested(cases, kind, k, None, False, judged) for kind in KINDS}

        def recall(n, found=found):
            return percent(sum(d[3] and d[2] < n for d in found["relationship"]), total)

        metrics.update({f"R@{n}": recall(n) for n in recall_at})
        for kind, suffix in KINDS.items():
            values = precisions(cases, found[kind], len(names))
            metrics[f"mAP_{suffix}"] = mean(values)
            metrics[f"pooled_AP_{suffix}"] = area([d[3] for d in found[kind]], total)
            metrics.update({f"AP_{suffix}-{x}": v for x, v in zip(names, values)})
        parts = (recall(50), metrics["mAP_rel"], metrics["mAP_phr"])
        metrics["score"] = 0.2 * parts[0] + 0.4 * parts[1] + 0.4 * parts[2]
    return results


def released(cases, ks, recall_at, names, limit, task="sgdet"):
    results = {}
    total = sum(len(case.relations) for case in cases)
    for k in ks:
        metrics = results[f"released_{task}_k{k}" if k else f"released_{task}"] = {}
        for n in recall_at:
            metrics[f"R@{n}"] = pooled(cases, lambda c, n=n, k=k: many_to_many(c, ranked(c, k, n)))
        for kind, suffix in KINDS.items():
            values = precisions(cases, tested(cases, kind, k, limit, True), len(names))
            if total:
                values = [0.0 if math.isnan(v) else v for v in values]
            shares = [count(cases, p) / total if total else NAN for p in range(len(names))]
            metrics[f"mAP_{suffix}"] = sum(values) / len(names)
            metrics[f"wmAP_{suffix}"] = sum(s * v for s, v in zip(shares, values))
            metrics.update({f"AP_{suffix}-{x}": v for x, v in zip(names, values)})
        recall = pooled(cases, lambda c, k=k: many_to_many(c, ranked(c, k, 50)))
        for name, kind in (("score", "mAP"), ("score_wtd", "wmAP")):
            both = metrics[f"{kind}_rel"] + metrics[f"{kind}_phr"]
            metrics[name] = 0.2 * recall + 0.4 * both
    return results


def relations(cases, ks, recall_at, names, limit, task="sgdet"):
    """Without the accuracies of the confusion report, which have an oracle of their own."""
    results = {}
    for case in cases:
        case.relations = list(dict.fromkeys(case.relations))
    for k in ks:
        metrics = results[f"relations_{task}_k{k}" if k else f"relations_{task}"] = {}
        for n in ("n", *recall_at):

            def find(case, n=n, k=k):
                limit = len(case.relations) if n == "n" else n
                return one_to_one(case, ranked(case, k)[:limit], "relationship")

            metrics[f"R@{n}"] = pooled(cases, find)
        values = precisions(cases, tested(cases, "relationship", k, limit, False), len(names))
        metrics["mAP"] = mean(values)
        metrics.update({f"AP-{x}": v for x, v in zip(names, values)})
    return results
