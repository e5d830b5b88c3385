"""Leak mutants: for every rule of exactness, the pipeline with that rule broken as a careless engineer would.

A mutant is a function that patches the product. test_mutants.py says which check of the suite catches which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mutants_of_deletion as deletion
import mutants_of_ingest as ingest
import mutants_of_serving as serving
import mutants_of_training as training
import pytest

NI = "non-interference"


class Mutant(NamedTuple):
    """What is broken; ``catches`` begins the name of the check that is run first, beside
    non-interference."""

    rule: int
    name: str
    apply: Callable[[pytest.MonkeyPatch], None]
    catches: str = NI


MUTANTS = (
    Mutant(1, "placed by row", ingest.by_row, "test_all_records_of_a_subject_share_a_slice"),
    Mutant(1, "placed by record", ingest.by_record, "test_all_records_of_a_subject_share_a_slice"),
    Mutant(1, "key drawn again for balance", ingest.rebalanced),
    Mutant(1, "co-subjects not entered", ingest.owners_only, "test_a_record_of_two_people_goes_with_either"),
    Mutant(1, "subjects compared as typed", ingest.as_typed, "test_subjects_in_memory_are_normalised"),
    Mutant(2, "identity from the version", ingest.versioned, "test_an_identity_holds_what_defines_the_result_"),
    Mutant(2, "identity without digests", ingest.no_digests, "test_an_identity_holds_what_defines_the_result_"),
    Mutant(2, "digests without salt", ingest.unsalted, "test_a_digest_confirms_no_guess"),
    Mutant(2, "nodes found by listing", deletion.listed, "test_a_dead_node_that_is_still_on_the_disk_is_not_served"),
    Mutant(3, "batches from a global generator", training.global_generator, "test_two_runs_give_the_same_bits"),
    Mutant(3, "seed from the number of records", training.seed_from_size),
    Mutant(3, "dropout by place in the pass", training.dropout_by_place, "test_dropout_follows_node_and_record"),
    Mutant(3, "record key by row", training.key_by_row, "test_row_order_changes_no_bit"),
    Mutant(3, "streams keyed by identity", training.keyed_by_identity, "test_two_runs_give_the_same_bits"),
    Mutant(
        3, "initialised by place in the pass", training.initial_by_place, "test_threads_and_pass_size_change_no_bit"
    ),
    Mutant(3, "base in training mode", training.base_trains, "test_the_frozen_base_is_in_eval_mode"),
    Mutant(4, "shared head", training.shared_head),
    Mutant(4, "steps from the mean slice size", training.steps_from_size),
    Mutant(4, "batch from the smallest slice of a pass", training.smallest_slice),
    Mutant(4, "moments carried to the next pass", training.carried_moments),
    Mutant(4, "weight decay on frozen adapters", training.decayed_frozen, "test_two_runs_give_the_same_bits"),
    Mutant(4, "frozen adapters not watched", training.unwatched, "test_frozen_adapters_are_watched"),
    Mutant(5, "layers by substring", training.layer_substring, "test_layers_are_matched_by_parsed_index_"),
    Mutant(5, "targets by substring", training.target_substring, "test_layers_are_matched_by_parsed_index_"),
    Mutant(6, "best step on deletable data", training.best_step),
    Mutant(7, "classes inferred from the table", training.inferred_classes),
    Mutant(7, "scaling fitted to the table", ingest.fitted_scaling),
    Mutant(7, "declared part unknown to the ledger", ingest.undeclared, "test_receipts"),
    Mutant(8, "gradients clipped across nodes", training.joint_clip),
    Mutant(8, "a norm over the nodes of a pass", training.joint_norm, "test_a_longer_text_moves_no_other_node"),
    Mutant(8, "padding to the joint batch", training.joint_padding, "test_a_longer_text_moves_no_other_node"),
    Mutant(8, "loss averaged over the joint batch", training.joint_mean),
    Mutant(8, "on another node's ancestors", training.others_ancestors),
    Mutant(8, "torch's own threads", training.torch_threads, "test_batch_and_threads_change_no_answer"),
    Mutant(8, "kernels in mode fast", training.fast_kernels, "test_the_frozen_base_is_in_eval_mode"),
    Mutant(9, "multiplied instead of skipped", deletion.multiplied, "test_dead_adapters_in_memory_are_nan_and_unread"),
    Mutant(10, "dead weights stay in memory", deletion.kept_in_memory, "test_dead_adapters_in_memory_"),
    Mutant(10, "loaded weights kept", deletion.loaded_kept, "test_nothing_that_a_service_reaches_holds_dead_weights"),
    Mutant(10, "activation cache not flushed", training.unflushed, "test_states_and_records_of_the_deleted_"),
    Mutant(10, "activation cache left at the end", training.trunk_stays, "test_training_leaves_no_copy_in_memory"),
    Mutant(10, "moments stay in memory", training.moments_stay, "test_training_leaves_no_copy_in_memory"),
    Mutant(10, "dead nodes not erased", deletion.nodes_stay, "test_deletion_masks_records_acknowledges_then_erases"),
    Mutant(10, "manifests erased, blobs not", deletion.blobs_stay, "test_erasure_leaves_no_file_and_zeroes"),
    Mutant(10, "unlinked, not overwritten", deletion.unlinked, "test_erasure_leaves_no_file_and_zeroes"),
    Mutant(10, "records not erased", deletion.records_stay),
    Mutant(10, "a log of losses in the store", training.loss_log, "test_a_store_holds_what_is_listed_and_nothing_else"),
    Mutant(10, "stale node published", training.stale_published, "test_a_node_that_a_deletion_makes_stale_while"),
    Mutant(10, "only what was there erased", deletion.dead_if_there, "test_a_node_published_in_the_very_moment"),
    Mutant(10, "tokenised rows kept", ingest.tokens_kept, "test_tokenised_rows_go_with_the_record"),
    Mutant(10, "exports not listed", deletion.exports_untold, "test_a_receipt_names_the_copies_that_left"),
    Mutant(
        10, "exports listed when written", serving.exported_first, "test_the_ledger_knows_first_and_receipts_name_it"
    ),
    Mutant(10, "evicted adapters stay in memory", serving.evicted_stays, "test_what_was_dropped_is_nan_and_what_is_"),
    Mutant(
        10, "keys and values not overwritten", serving.keys_stay, "test_a_deletion_on_the_way_begins_the_answer_anew"
    ),
    Mutant(10, "keys and values in a caller's hand", serving.caches_stay, "test_a_cache_in_a_callers_hand_dies_with_"),
    Mutant(10, "a page listed when written", serving.reported_first, "test_it_is_registered_before_it_is_written"),
    Mutant(10, "cache of answers not flushed", deletion.cached_answers),
    Mutant(11, "ties by the number of requests", deletion.ties_by_requests),
    Mutant(11, "the old path, cut", deletion.cut_path),
    Mutant(11, "held by history", serving.held_by_history, "test_at_rest_the_state_is_a_function_of_the_dirty_"),
    Mutant(12, "plan from the records of a slice", training.plan_from_records),
    Mutant(
        13, "returned subject trained again", deletion.returned, "test_a_deleted_subject_that_comes_back_is_dropped"
    ),
    Mutant(13, "returned co-subject", deletion.returned_co, "test_a_deleted_co_subject_that_comes_back_is_dropped"),
    Mutant(13, "healing with a returned subject", deletion.healed_as_it_lies, "test_a_deleted_person_in_an_old_copy_"),
    Mutant(13, "healed with a request pending", deletion.healed_early, "test_a_request_while_a_slice_is_healed_"),
    Mutant(13, "readmitted over a later request", deletion.readmitted_anyway, "test_a_request_during_a_readmission_"),
    Mutant(13, "request id forgotten", deletion.forgotten_id, "test_receipts"),
    Mutant(
        14, "exported while nothing is dirty", serving.exported_by_dirty, "test_a_node_whose_slice_dies_and_heals_as_"
    ),
    Mutant(14, "a worker that opens the ledger", serving.ledger_in_worker, "test_a_worker_does_not_open_the_ledger"),
    Mutant(14, "stale answer released", deletion.unchecked, "test_an_answer_overtaken_by_a_deletion_is_not_released"),
    Mutant(14, "epoch read only before computing", deletion.checked_before, "test_an_answer_overtaken_by_a_deletion_"),
    Mutant(14, "epoch not raised", deletion.epoch_stays, "test_an_answer_overtaken_by_a_deletion_is_not_released"),
    Mutant(14, "acknowledged before durable", deletion.deferred, "test_deletion_masks_records_acknowledges_"),
    Mutant(14, "masked after the record", deletion.masked_late, "test_deletion_masks_records_acknowledges_"),
    Mutant(
        14, "hash of the dirty set for a counter", serving.dirty_for_epoch, "test_a_service_that_missed_a_deletion_"
    ),
    Mutant(
        14,
        "healed slices taken for what they were",
        serving.healed_is_same,
        "test_a_service_that_missed_a_deletion_and_",
    ),
    Mutant(14, "a node loaded anew passes", serving.loaded_anew, "test_what_was_dropped_is_nan_and_what_is_"),
    Mutant(14, "words checked before they are written", serving.written_on, "test_a_deletion_on_the_way_begins_the_"),
    Mutant(
        15, "verified with the store's records", deletion.stores_records, "test_verification_retrains_from_the_table"
    ),
    Mutant(
        15, "verified with the store's weights", deletion.stores_weights, "test_verification_retrains_from_the_table"
    ),
    Mutant(
        15, "a healed node taken for what it was", deletion.verified_by_node, "test_a_deletion_meanwhile_is_no_diff"
    ),
    Mutant(15, "certified on a difference", deletion.certified_anyway, "test_nothing_is_certified_on_a_difference"),
)
